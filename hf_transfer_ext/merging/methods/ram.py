"""RAM: sum what only one model changed, average what several changed."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import changes_of
from hf_transfer_ext.merging.arithmetic.overlap import merge_overlap
from hf_transfer_ext.merging.method import merge_method


@merge_method()
def ram(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    epsilon: float = 1e-5,
) -> Float[Tensor, "*shape"]:
    r"""Changes that only one model made count in full, those that several made count with their mean.

    .. math::
        \theta = \theta_0 + \frac{1}{\max(1, n)} \sum_{i: |t_i| > \epsilon} t_i, \quad
        n = \left| \{i: |t_i| > \epsilon\} \right|

    Args:
        epsilon: Largest change that counts as none, in units of the weights.

    Returns:
        The merged weights.

    Source: Reinforced Agent Merging (RAM), Yuan et al. 2026, https://arxiv.org/abs/2601.13572
    """
    return base + merge_overlap(changes_of(base, models), epsilon, [1.0] * len(models))
