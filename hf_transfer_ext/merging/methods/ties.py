"""TIES: trim each change to its largest elements, elect a sign, and add the agreeing elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import check_weights, elect_sign, one_for_zero, sum_of
from hf_transfer_ext.merging.arithmetic.fast import ties_by_kernels
from hf_transfer_ext.merging.arithmetic.rescaling import smallest_kept_and_scales
from hf_transfer_ext.merging.arithmetic.selection import keep_magnitudes
from hf_transfer_ext.merging.method import PerModel, Promises, for_each, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import Coefficient, PerModelCoefficient


@merge_method(
    statistics=smallest_kept_and_scales,
    check=check_weights,
    fast=ties_by_kernels,
    promises=Promises(alone={"weight": 1}),
)
def ties(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient,
    density: PerModel = 1.0,
    trim_over_model: bool = False,
    rescale: bool = False,
    normalize: bool = True,
    lambda_: Coefficient = 1.0,
    thresholds: Sequence[float],
    scales: Sequence[float | Float[Tensor, ""]],
) -> Float[Tensor, "*shape"]:
    r"""Keep the largest changes of each model that agree in sign with the weighted majority.

    .. math::
        c_i = w_i \, t_i [|t_i| \ge q_i], \quad s = \mathrm{sign} \sum_i c_i, \quad
        \theta = \theta_0 + \lambda \sum_{i: c_i s > 0} c_i \Big/ \sum_{i: c_i s > 0} w_i

    When to use it: for three or more fine-tunes of one base that change the same weights in opposite directions.

    Args:
        weight: w_i.
        density: Share of elements to keep, by magnitude.
        trim_over_model: Keep this share of all tensors together, as in the paper, and not of each tensor.
        rescale: Rescale the kept part of each change, per tensor, to the original sum of magnitudes.
        normalize: Divide by the sum of the weights of the agreeing changes.
        lambda_: Scale of the combined change (`lambda` in YAML).
        thresholds: q_i, the smallest kept magnitude.
        scales: Factors of the kept parts; 1 without `rescale`.

    Returns:
        The merged weights.

    Deviations: without `trim_over_model`, each tensor is trimmed separately, as in mergekit and PEFT. Elements that
    tie with the smallest kept one are all kept. If the changes cancel to exactly 0, the positive sign is elected.

    Source: TIES-Merging, Yadav et al. 2023, https://arxiv.org/abs/2306.01708
    """
    weights = for_each(weight, models)
    changes = [model - base for model in models]
    sparse = [
        scale * keep_magnitudes(change, low) for change, low, scale in zip(changes, thresholds, scales, strict=True)
    ]
    votes = [w * change for w, change in zip(weights, sparse, strict=True)]
    sign = elect_sign(votes)
    agreeing = [(vote * sign).relu() for vote in votes]  # magnitudes of the votes with the elected sign, 0 elsewhere
    merged = sign * sum_of(agreeing)
    if normalize:
        merged = merged / one_for_zero(sum_of(w * one.sign() for w, one in zip(weights, agreeing, strict=True)))
    return base + lambda_ * merged
