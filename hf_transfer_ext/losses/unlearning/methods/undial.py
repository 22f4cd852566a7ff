from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class undial(Method):
    r"""UNDIAL: self-distillation from logits in which the answer's own token is lowered.

    .. math:: -\sum_v \operatorname{softmax}(z^{ref} - \beta\, e_y)_v \ln p_v

    When to use it: without a retain set. Its target is fixed, so it is stable over many epochs.

    Source: Dong et al., "UNDIAL: self-distillation with adjusted logits", 2024, https://arxiv.org/abs/2402.10052
    """

    forget = "undial"
