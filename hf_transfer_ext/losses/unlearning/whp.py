from __future__ import annotations

import torch

from hf_transfer_ext.losses.needs import TokenRows, Tokens, averaged_over, require_at_least


@averaged_over("tokens")
def whp(
    logits: TokenRows, reference_logits: TokenRows, reinforced_logits: TokenRows, *, strength: float = 5.0
) -> Tokens:
    r"""Distill from the reference without whatever a model trained further on the forget set makes more likely.

    .. math:: -\sum_v \operatorname{softmax}\big(z^{ref} - a \max(0, z^{+} - z^{ref})\big)_v \ln p_v

    z+ are the logits of the reinforced model. The authors train on the most likely token of this distribution; here
    it is the whole distribution.

    Args:
        strength: How far what was reinforced is lowered (a), >= 0; 0 distills from the reference as it is.

    Returns:
        Nats per token: a cross-entropy, at least the entropy of the adjusted reference.

    Source: Eldan and Russinovich, "Who's Harry Potter? Approximate unlearning in LLMs", 2023, section 2.1,
    https://arxiv.org/abs/2310.02238
    """
    require_at_least("strength", strength, 0)
    adjusted = reference_logits - strength * (reinforced_logits - reference_logits).clamp(min=0.0)
    return -(torch.softmax(adjusted, -1) * torch.log_softmax(logits, -1)).sum(-1)
