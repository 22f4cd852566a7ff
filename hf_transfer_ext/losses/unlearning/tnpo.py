from __future__ import annotations

import torch

from hf_transfer_ext.losses.needs import Tokens, averaged_over, require_at_least


@averaged_over("tokens")
def tnpo(log_probs: Tokens, reference_log_probs: Tokens, *, beta: float = 4.0) -> Tokens:
    r"""NPO by token: each token's ascent fades as it gets less likely than under the reference.

    .. math:: \operatorname{sg}\Big(\frac{2 p^{\beta}}{p^{\beta} + p_{ref}^{\beta}}\Big) \ln p

    The weight lies in (0, 2), is 1 where model and reference agree, and carries no gradient.

    Args:
        beta: Inverse temperature, > 0.

    Returns:
        Nats per token, <= 0.

    Source: Wang et al., "Rethinking LLM unlearning objectives: a gradient perspective", 2025,
    https://arxiv.org/abs/2502.19301
    """
    require_at_least("beta", beta, 0, strictly=True)
    weight = 2.0 * torch.sigmoid(beta * (log_probs - reference_log_probs)).detach()
    return weight * log_probs
