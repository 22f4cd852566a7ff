from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class kl_min(Method):
    r"""KL minimization: ascent on the forget set, the reference's distribution on the retain set.

    .. math:: \ln p(y_t^f) + \mathrm{KL}(p_{ref} \| p)

    When to use it: instead of `grad_diff` where the retain answers themselves must not be learned any better.

    Source: Maini et al., "TOFU", 2024, section 3.2, https://arxiv.org/abs/2401.06121
    """

    forget = "grad_ascent"
    retain = "retain_kl"
