"""Model breadcrumbs with TIES: drop the largest outliers and the smallest elements of each change, elect a sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import check_weights, elect_sign, one_for_zero, sum_of
from hf_transfer_ext.merging.arithmetic.fast import breadcrumbs_ties_by_kernels
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
    fast=breadcrumbs_ties_by_kernels,
    promises=Promises(alone={"weight": 1}),
)
def breadcrumbs_ties(
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
    r"""Keep the elements of medium magnitude of each change that agree in sign with the weighted majority.

    .. math::
        c_i = w_i \, t_i [l_i \le |t_i| \le h_i], \quad s = \mathrm{sign} \sum_i c_i, \quad
        \theta = \theta_0 + \lambda \sum_{i: c_i s > 0} c_i

    When to use it: as `breadcrumbs`, where the fine-tunes also disagree in sign.

    Args:
        weight: w_i.
        density: Share of elements to keep in each tensor; 1 keeps everything.
        gamma: Share of largest elements to drop first; 0.006 to 0.01 is typical.
        rescale: Rescale the kept part of each change, per tensor, to the original sum of magnitudes.
        normalize: Also divide by the sum of the weights of the agreeing changes.
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
    votes = [w * change for w, change in zip(weights, sparse, strict=True)]
    sign = elect_sign(votes)
    agreeing = [(vote * sign).relu() for vote in votes]  # magnitudes of the votes with the elected sign, 0 elsewhere
    merged = sign * sum_of(agreeing)
    if normalize:
        merged = merged / one_for_zero(sum_of(w * one.sign() for w, one in zip(weights, agreeing, strict=True)))
    return base + lambda_ * merged
