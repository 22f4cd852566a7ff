from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class me_gd(Method):
    r"""Maximum entropy on the forget answers, cross-entropy on the retain set (ME+GD).

    .. math:: \mathrm{KL}(U \| p^f) + \text{NLL}_r

    When to use it: where no answer should be more likely than another. Outputs on forget prompts become noise.

    Source: Yuan et al., "A closer look at machine unlearning for large language models", 2024,
    https://arxiv.org/abs/2410.08109
    """

    forget = "me"
    retain = "retain_nll"
