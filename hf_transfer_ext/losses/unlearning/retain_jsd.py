from __future__ import annotations

import math

import torch

from hf_transfer_ext.losses.needs import TokenRows, Tokens, averaged_over


@averaged_over("tokens")
def retain_jsd(logits: TokenRows, reference_logits: TokenRows) -> Tokens:
    r"""Jensen-Shannon divergence between model and reference on the retain set.

    .. math:: \tfrac{1}{2} \mathrm{KL}(p \| m) + \tfrac{1}{2} \mathrm{KL}(q \| m), \quad m = \tfrac{1}{2}(p + q)

    Returns:
        Nats per token, from 0 (they agree) to ln 2.

    Source: Singh et al., JensUn, 2025, https://arxiv.org/abs/2509.02820
    """
    log_q, log_p = torch.log_softmax(reference_logits, -1), torch.log_softmax(logits, -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
