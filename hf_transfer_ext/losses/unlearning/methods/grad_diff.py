from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class grad_diff(Method):
    r"""Gradient difference: ascent on the forget set, descent on the retain set.

    .. math:: \ln p(y_t^f) - \ln p(y_t^r)

    When to use it: as the baseline with a retain set. The ascent still has no bound, so stop early.

    Source: Liu et al., "Continual learning and private unlearning", 2022, https://arxiv.org/abs/2203.12817
    """

    forget = "grad_ascent"
    retain = "retain_nll"
