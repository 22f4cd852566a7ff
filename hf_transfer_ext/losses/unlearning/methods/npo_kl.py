from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class npo_kl(Method):
    r"""Negative preference optimization that keeps the reference's distribution on the retain set.

    .. math:: -\frac{2}{\beta} \ln \sigma\big(\beta (\ell_\theta - \ell_{ref})\big) + \mathrm{KL}(p_{ref} \| p)

    When to use it: as `npo`, where the retain set is text that the model should not be fine-tuned on.

    Source: Zhang et al., "Negative preference optimization", 2024, https://arxiv.org/abs/2404.05868
    """

    forget = "npo"
    retain = "retain_kl"
