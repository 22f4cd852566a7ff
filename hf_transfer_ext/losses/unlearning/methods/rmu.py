from __future__ import annotations

from hf_transfer_ext.losses.unlearning_method import Method


class rmu(Method):
    r"""RMU: hidden states of one layer are pulled to a random direction on the forget set, and held on the retain set.

    .. math:: \tfrac{1}{d} \lVert h^f - c\, u \rVert^2 + \tfrac{1}{d} \lVert h^r - h_{ref}^r \rVert^2

    Set `hidden_layer`. The authors train only a few layers below it; an adapter has to reach them.

    When to use it: for a whole domain (hazardous knowledge) given as plain text, without questions and answers.

    Source: Li et al., "The WMDP benchmark", 2024, section 4, https://arxiv.org/abs/2403.03218
    """

    forget = "rmu"
    retain = "retain_hidden"
