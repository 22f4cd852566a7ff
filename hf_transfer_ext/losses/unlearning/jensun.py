from __future__ import annotations

import math

import torch

from hf_transfer_ext.losses.needs import TokenIds, TokenRows, Tokens, averaged_over


@averaged_over("tokens")
def jensun(logits: TokenRows, refusal_targets: TokenIds) -> Tokens:
    r"""Jensen-Shannon divergence to a refusal: bounded, so that a forgotten token stops pushing.

    .. math:: \tfrac{1}{2} \mathrm{KL}(e_r \| m) + \tfrac{1}{2} \mathrm{KL}(p \| m), \quad m = \tfrac{1}{2}(e_r + p)

    `e_r` puts all its mass on the refusal's token, the refusal being repeated along the answer. Written out, with
    p_r the refusal token's probability:

    .. math:: \tfrac{1}{2} \Big[\ln \frac{2}{1 + p_r} + (1 - p_r) \ln 2 + p_r \ln \frac{2 p_r}{1 + p_r}\Big]

    Returns:
        Nats per token, from 0 (the refusal for sure) to ln 2 (never the refusal).

    Source: Singh et al., "Unlearning that lasts: utility-preserving, robust, and almost irreversible forgetting in
    LLMs" (JensUn), 2025, https://arxiv.org/abs/2509.02820
    """
    log_p = torch.log_softmax(logits, -1).gather(-1, refusal_targets[:, None])[:, 0]
    p = log_p.exp()
    ratio = math.log(2.0) - torch.log1p(p)  # ln(2 / (1 + p_r))
    return 0.5 * (ratio + (1.0 - p) * math.log(2.0) + p * (log_p + ratio))
