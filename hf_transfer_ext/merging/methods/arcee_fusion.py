"""Arcee Fusion: take over from the other model only the changes of outstanding importance."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.importance import importance_of, outstanding
from hf_transfer_ext.merging.method import merge_method


@merge_method(unit="row", count=(1, 1), statistics=outstanding)
def arcee_fusion(
    base: Float[Tensor, "rows columns"],
    models: Sequence[Float[Tensor, "rows columns"]],
    *,
    threshold: float,
) -> Float[Tensor, "rows columns"]:
    r"""Add the elements of the change whose importance is above the median by one and a half interquartile ranges.

    .. math::
        I = |\theta_1 - \theta_0| \cdot \mathrm{KL}(\mathrm{softmax}(\theta_1) \| \mathrm{softmax}(\theta_0)), \quad
        \theta = \theta_0 + (\theta_1 - \theta_0) [I \ge \mathrm{median} + 1.5 \, \mathrm{IQR}]

    with the softmax, and so the divergence, over each row.

    Args:
        threshold: Smallest importance that is taken over.

    Returns:
        The merged weights.

    Deviations: quartiles are exact; mergekit takes those of a random sample for tensors of more than 10^6 elements.

    Source: Arcee Fusion in mergekit, Goddard et al. 2024, https://arxiv.org/abs/2403.13257
    """
    change = models[0] - base
    return base + change * (importance_of(base, models[0]) >= threshold)
