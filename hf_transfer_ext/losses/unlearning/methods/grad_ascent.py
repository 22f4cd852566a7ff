from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class grad_ascent(Method):
    r"""Gradient ascent on the forget set, and nothing else.

    .. math:: \ln p(y_t)

    When to use it: as a baseline. It has no bound, and destroys the model within a few epochs of a common rate.

    Source: Jang et al., "Knowledge unlearning for mitigating privacy risks in language models", 2023,
    https://arxiv.org/abs/2210.01504
    """

    forget = "grad_ascent"
