"""Fisher merging: a mean of models that weights each parameter by how much its model depends on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import check_mean_weights, sum_of
from hf_transfer_ext.merging.method import Extra, Promises, for_each, merge_method
from hf_transfer_ext.merging.types import PerModelCoefficient


@merge_method(
    base="none",
    extra={"fisher": Extra(shape="weight")},
    check=check_mean_weights,
    promises=Promises(alone={"weight": 0.7}, equal={}),
)
def fisher(
    base: Float[Tensor, "*shape"] | None,
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient = 1.0,
    fisher_floor: float = 1e-6,
    fisher: Sequence[Float[Tensor, "*shape"]],
) -> Float[Tensor, "*shape"]:
    r"""The elementwise mean of the models, weighted by the diagonals of their Fisher information matrices.

    .. math:: \theta = \sum_i w_i \max(F_i, \epsilon) \, \theta_i \Big/ \sum_i w_i \max(F_i, \epsilon)

    This is the mode of the product of Gaussian posteriors around the models with precisions w_i F_i. With equal F_i,
    it is the same as `linear`.

    When to use it: where data of each task is at hand and the models differ in which weights they need.

    Args:
        weight: w_i; tuned on validation data in the paper.
        fisher_floor: epsilon, in units of F. Elements that no model depends on get the plain weighted mean.
        fisher: F_i, the mean of squared gradients of the log-likelihood, >= 0: in YAML, `tensors: {fisher: path}` of
            each model, with the names of the weights.

    Returns:
        The merged weights.

    Raises:
        ValueError: The weights sum to 0, or an element of F is negative.

    Deviations: the formula in the paper has no floor; its code clamps at 1e-6, as here.

    Source: Merging models with Fisher-weighted averaging, Matena and Raffel 2022, https://arxiv.org/abs/2111.09832
    """
    if any(bool((one < 0).any()) for one in fisher):
        raise ValueError("`fisher` has negative values, but Fisher diagonals are means of squares. Recompute it.")
    precisions = [
        w * torch.clamp(one, min=fisher_floor) for w, one in zip(for_each(weight, models), fisher, strict=True)
    ]
    total = sum_of(precision * model for precision, model in zip(precisions, models, strict=True))
    return total / sum_of(precisions)
