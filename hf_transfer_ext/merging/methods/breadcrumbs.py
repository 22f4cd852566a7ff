"""Model breadcrumbs: drop the largest outliers and the smallest elements of each change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import check_weights, sum_of
from hf_transfer_ext.merging.arithmetic.fast import breadcrumbs_by_kernels
from hf_transfer_ext.merging.arithmetic.rescaling import inner_magnitudes_and_scales
from hf_transfer_ext.merging.arithmetic.selection import keep_magnitudes
from hf_transfer_ext.merging.method import PerModel, Promises, for_each, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import Coefficient, PerModelCoefficient


@merge_method(
    statistics=inner_magnitudes_and_scales,
    check=check_weights,
    fast=breadcrumbs_by_kernels,
    promises=Promises(alone={"weight": 1}),
)
def breadcrumbs(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    rescale: bool = False,
    normalize: bool = False,
    lambda_: Coefficient = 1.0,
    bounds: Sequence[tuple[float, float]],
    scales: Sequence[float | Float[Tensor, ""]],
) -> Float[Tensor, "*shape"]:
    r"""Keep the elements of medium magnitude of each change, and add them all.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i \, t_i [l_i \le |t_i| \le h_i]

    When to use it: for many fine-tunes, whose largest changes are outliers and whose smallest are noise.

    Args:
        weight: w_i.
        density: Share of elements to keep in each tensor; 1 keeps everything.
        gamma: Share of largest elements to drop first; 0.006 to 0.01 is typical.
        rescale: Rescale the kept part of each change, per tensor, to the original sum of magnitudes.
        normalize: Also divide by the sum of the weights.
        lambda_: Scale of the combined change (`lambda` in YAML); the paper's alpha.
        bounds: (l_i, h_i), the smallest and largest kept magnitudes.
        scales: Factors of the kept parts; 1 without `rescale`.

    Returns:
        The merged weights.

    Deviations: the paper masks per row, this per tensor, as mergekit does. Elements that tie with a kept one are kept.

    Source: Model breadcrumbs, Davari and Belilovsky 2024, https://arxiv.org/abs/2312.06795
    """
    weights = for_each(weight, models)
    changes = [model - base for model in models]
    sparse = [
        scale * keep_magnitudes(change, low, high)
        for change, (low, high), scale in zip(changes, bounds, scales, strict=True)
    ]
    merged = sum_of(w * change for w, change in zip(weights, sparse, strict=True))
    if normalize:
        merged = merged / (sum(weights) or 1.0)  # all weights 0: the base is unchanged
    return base + lambda_ * merged
