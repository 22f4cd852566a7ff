from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class llmu(Method):
    r"""LLMU: ascent on the answers, random answers in their place, and the reference's distribution on the retain set.

    .. math:: -\tfrac{1}{2} \ell_\theta(y^f) / n + \ell_\theta(y^{rdn}) / n^{rdn} + \mathrm{KL}(p_{ref} \| p)

    The random answers are those to other questions, of the retain set: five are drawn for each row to forget, and one
    of them in each epoch. A row's own column "alternative" goes first.

    When to use it: for harmful outputs, where what the model says instead does not matter. The ascent has no bound:
    few steps at a small learning rate.

    Source: Yao et al., "Large language model unlearning", 2023, https://arxiv.org/abs/2310.10683
    """

    forget = "llmu"
    retain = "retain_kl"
    alternatives = "retain answers"
