from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class wga(Method):
    r"""Weighted gradient ascent, in which tokens that are already forgotten stop pushing.

    .. math:: \operatorname{sg}(p^{\beta}) \ln p(y_t^f) + \text{NLL}_r

    When to use it: instead of `grad_diff`; it needs no reference.

    Source: Wang et al., "Rethinking LLM unlearning objectives: a gradient perspective", 2025,
    https://arxiv.org/abs/2502.19301
    """

    forget = "wga"
    retain = "retain_nll"
