from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class tnpo(Method):
    r"""Token-wise negative preference optimization.

    .. math:: \operatorname{sg}\Big(\frac{2 p^{\beta}}{p^{\beta} + p_{ref}^{\beta}}\Big) \ln p(y_t^f) + \text{NLL}_r

    When to use it: as `npo`, for long answers of which only some tokens carry the knowledge.

    Source: Wang et al., "Rethinking LLM unlearning objectives: a gradient perspective", 2025,
    https://arxiv.org/abs/2502.19301
    """

    forget = "tnpo"
    retain = "retain_nll"
