from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class idk(Method):
    r"""Fine-tuning on refusals instead of the answers ("I don't know").

    .. math:: \ell_\theta^{idk} / n + \text{NLL}_r

    When to use it: where the model should say that it does not know. It learns to refuse, which is not the same as
    having forgotten: audit it.

    Source: Maini et al., "TOFU", 2024, section 3.2, https://arxiv.org/abs/2401.06121
    """

    forget = "idk"
    retain = "retain_nll"
