from __future__ import annotations

from hf_transfer_ext.losses.needs import Tokens, averaged_over


@averaged_over("tokens")
def grad_ascent(log_probs: Tokens) -> Tokens:
    r"""Minus the cross-entropy: minimizing it makes the answer less likely, without bound.

    .. math:: \ln p(y_t)

    It collapses a model within a few steps of a common learning rate; with a retain loss it is GradDiff.

    Returns:
        Nats per token, <= 0.

    Source: Jang et al., "Knowledge unlearning for mitigating privacy risks in language models", 2023,
    https://arxiv.org/abs/2210.01504
    """
    return log_probs
