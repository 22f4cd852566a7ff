from __future__ import annotations

from hf_transfer_ext.losses.needs import Tokens, averaged_over, require_at_least


@averaged_over("tokens")
def wga(log_probs: Tokens, *, beta: float = 1.0) -> Tokens:
    r"""Weighted gradient ascent: tokens that are already forgotten stop pushing.

    .. math:: \operatorname{sg}(p^{\beta}) \ln p

    Args:
        beta: Exponent of the weight, >= 0; 0 is `grad_ascent`.

    Returns:
        Nats per token, <= 0.

    Source: Wang et al., "Rethinking LLM unlearning objectives: a gradient perspective", 2025,
    https://arxiv.org/abs/2502.19301
    """
    require_at_least("beta", beta, 0)
    return (beta * log_probs).exp().detach() * log_probs
