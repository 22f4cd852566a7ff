from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class idk_dpo(Method):
    r"""Preference of a refusal over the answer to forget.

    .. math:: -\frac{2}{\beta} \ln \sigma\big(\beta
        [(\ell_{ref}^{idk} - \ell_\theta^{idk}) - (\ell_{ref}^f - \ell_\theta^f)]\big) + \text{NLL}_r

    When to use it: as `idk`, with a push away from the answer too.

    Source: Maini et al., "TOFU", 2024, section 3.2, https://arxiv.org/abs/2401.06121
    """

    forget = "dpo"
    retain = "retain_nll"
