from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class npo(Method):
    r"""Negative preference optimization with cross-entropy on the retain set.

    .. math:: -\frac{2}{\beta} \ln \sigma\big(\beta (\ell_\theta - \ell_{ref})\big) + \text{NLL}_r

    When to use it: first. Its gradient fades as an answer is forgotten, so it seldom destroys the model.

    Source: Zhang et al., "Negative preference optimization", 2024, https://arxiv.org/abs/2404.05868
    """

    forget = "npo"
    retain = "retain_nll"
