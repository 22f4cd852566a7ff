from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class jensun(Method):
    r"""JensUn: Jensen-Shannon divergence to a refusal, and to the reference on the retain set.

    .. math:: \mathrm{JSD}(p^f, e_r) + \mathrm{JSD}(p^r, p_{ref}^r)

    When to use it: where utility matters most: both losses are bounded, and a forgotten token stops pushing.

    Source: Singh et al., "Unlearning that lasts" (JensUn), 2025, https://arxiv.org/abs/2509.02820
    """

    forget = "jensun"
    retain = "retain_jsd"
