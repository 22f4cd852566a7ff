from __future__ import annotations

import torch

from hf_transfer_ext.losses.needs import TokenRows, Tokens, averaged_over


@averaged_over("tokens")
def retain_kl(logits: TokenRows, reference_logits: TokenRows) -> Tokens:
    r"""KL(reference || model) on the retain set, over the answers' tokens only.

    .. math:: \sum_v q_v (\ln q_v - \ln p_v), \quad q = \text{reference}, p = \text{model}

    Widespread code also averages over the prompt and the padding, which weakens it with the padding's share.

    Returns:
        Nats per token, >= 0, and 0 where model and reference agree.

    Source: Maini et al., "TOFU", 2024, section 3.2 (KL minimization), https://arxiv.org/abs/2401.06121
    """
    log_q, log_p = torch.log_softmax(reference_logits, -1), torch.log_softmax(logits, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)
