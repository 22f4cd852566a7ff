from __future__ import annotations

from hf_transfer_ext.losses.needs import Tokens, averaged_over, require_at_least


@averaged_over("tokens")
def satimp(log_probs: Tokens, *, beta1: float = 5.0, beta2: float = 1.0) -> Tokens:
    r"""Gradient ascent weighted by saturation (still likely) and importance (not yet certain).

    .. math:: \operatorname{sg}\big(p^{\beta_1} (1 - p)^{\beta_2}\big) \ln p

    Args:
        beta1: Exponent of p, >= 0: how fast a forgotten token stops pushing.
        beta2: Exponent of 1 - p, >= 0: how little a certain token pushes.

    Returns:
        Nats per token, <= 0.

    Source: Yang et al., "Exploring criteria of loss reweighting to enhance LLM unlearning", 2025,
    https://arxiv.org/abs/2505.11953
    """
    require_at_least("beta1", beta1, 0)
    require_at_least("beta2", beta2, 0)
    p = log_probs.detach().exp()
    return p**beta1 * (1.0 - p).clamp(min=0.0) ** beta2 * log_probs
