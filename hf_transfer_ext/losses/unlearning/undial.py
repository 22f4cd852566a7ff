from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from hf_transfer_ext.losses.needs import TokenIds, TokenRows, Tokens, averaged_over, require_at_least


@averaged_over("tokens")
def undial(logits: TokenRows, reference_logits: TokenRows, targets: TokenIds, *, beta: float = 10.0) -> Tokens:
    r"""Distil from the reference with the answer's own logit lowered.

    .. math:: -\sum_v \operatorname{softmax}(z^{ref} - \beta\, e_y)_v \ln p_v

    Bounded; zero gradient when the model matches the adjusted reference. Over answer tokens only.

    Args:
        beta: How far the answer's logit is lowered, >= 0.

    Returns:
        Nats per token: a cross-entropy, at least the entropy of the adjusted reference.

    Source: Dong et al., "UNDIAL: self-distillation with adjusted logits", 2024, https://arxiv.org/abs/2402.10052
    """
    require_at_least("beta", beta, 0)
    adjusted = reference_logits - beta * one_hot(targets, logits.shape[-1]).to(reference_logits.dtype)
    return -(torch.softmax(adjusted, -1) * torch.log_softmax(logits, -1)).sum(-1)
