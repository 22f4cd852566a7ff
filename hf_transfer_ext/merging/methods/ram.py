"""RAM: add elements that only one model changed, average those that several changed."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from hf_transfer_ext.merging.arithmetic.changes import sum_of
from hf_transfer_ext.merging.method import Promises, merge_method


@merge_method(promises=Promises(alone={"epsilon": 0.0}))
def ram(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    epsilon: float = 1e-5,
) -> Float[Tensor, "*shape"]:
    r"""Add the changes of elements that only one model changed, and the mean change of elements that several changed.

    .. math::
        \theta = \theta_0 + \frac{1}{\max(1, n)} \sum_{i: |t_i| > \epsilon} t_i, \quad
        n = \left| \{i: |t_i| > \epsilon\} \right|

    When to use it: for models trained by reinforcement learning, whose changes are sparse and seldom overlap.

    Args:
        epsilon: Changes of at most this magnitude count as none, in units of the weights.

    Returns:
        The merged weights.

    Source: Reinforced Agent Merging (RAM), Yuan et al. 2026, https://arxiv.org/abs/2601.13572
    """
    changes = [model - base for model in models]
    sparse = [hardshrink(change, epsilon) for change in changes]  # 0 where |t_i| <= epsilon
    count = sum_of(one.sign().abs() for one in sparse)
    return base + sum_of(sparse) / count.clamp(min=1)
