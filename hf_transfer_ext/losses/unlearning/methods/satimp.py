from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class satimp(Method):
    r"""SatImp: ascent weighted by saturation and importance of each token.

    .. math:: 0.1 \cdot \operatorname{sg}\big(p^{\beta_1} (1 - p)^{\beta_2}\big) \ln p(y_t^f) + \text{NLL}_r

    When to use it: where answers share many common words with answers to keep: certain tokens push little.

    Source: Yang et al., "Exploring criteria of loss reweighting to enhance LLM unlearning", 2025,
    https://arxiv.org/abs/2505.11953
    """

    forget = "satimp"
    retain = "retain_nll"
    gamma = 0.1
