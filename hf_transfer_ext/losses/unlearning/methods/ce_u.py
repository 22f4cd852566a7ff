from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class ce_u(Method):
    r"""CE-U: cross-entropy towards the model's own distribution without the answer's token.

    .. math:: -\sum_{v \ne y} q_v \ln p_v, \quad q = \operatorname{softmax}(z : z_y = -\infty)

    When to use it: without a retain set and without a reference.

    Source: Yang, "CE-U: cross entropy unlearning", 2025, https://arxiv.org/abs/2503.01224
    """

    forget = "ce_u"
