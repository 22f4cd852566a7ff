from __future__ import annotations

from hf_transfer_ext.losses.needs import Tokens, averaged_over


@averaged_over("tokens")
def retain_nll(log_probs: Tokens) -> Tokens:
    r"""Cross-entropy on the retain set.

    .. math:: -\ln p(y_t)

    Returns:
        Nats per token, >= 0.

    Source: Liu et al., "Continual learning and private unlearning", 2022 (gradient difference),
    https://arxiv.org/abs/2203.12817
    """
    return -log_probs
