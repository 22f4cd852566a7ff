from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class idk_ap(Method):
    r"""IDK+AP: refusals on the forget set, and on the retain set a preference of the answer over a refusal.

    .. math:: \ell_\theta^{idk}(x_f) / n - \frac{1}{\beta} \ln \sigma\big(\beta
        (\ell_\theta^{idk}(x_r) - \ell_\theta(x_r))\big)

    When to use it: instead of `idk` where the model must not learn to refuse questions in general.

    Source: Yuan et al., "A closer look at machine unlearning for large language models", 2024,
    https://arxiv.org/abs/2410.08109
    """

    forget = "idk"
    retain = "retain_ap"
