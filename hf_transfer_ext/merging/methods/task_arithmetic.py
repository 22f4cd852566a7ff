"""Task arithmetic: the base model plus the weighted sum of all changes (task vectors)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import check_weights, sum_of
from hf_transfer_ext.merging.arithmetic.fast import task_arithmetic_by_kernels
from hf_transfer_ext.merging.method import Promises, for_each, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import Coefficient, PerModelCoefficient


def factors_of_changes(*, weight: Sequence[float], normalize: bool, lambda_: float) -> list[float]:
    """lambda w_i, divided by the sum of the w_i with `normalize`."""
    scale = lambda_ / (sum(weight) or 1.0) if normalize else lambda_
    return [one * scale for one in weight]


@merge_method(
    check=check_weights,
    fast=task_arithmetic_by_kernels,
    change_factors=factors_of_changes,
    promises=Promises(alone={"weight": 1}),
)
def task_arithmetic(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient,
    normalize: bool = False,
    lambda_: Coefficient = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Add what each model learned to the base; a negative weight subtracts it.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)

    When to use it: first, for fine-tunes of one base; with a negative weight, to take away what a fine-tune
    learned.

    Args:
        weight: w_i, any real number.
        normalize: Also divide by the sum of the weights.
        lambda_: Scale of the combined change (`lambda` in YAML).

    Returns:
        The merged weights.

    Source: Editing models with task arithmetic, Ilharco et al. 2023, https://arxiv.org/abs/2212.04089
    """
    weights = for_each(weight, models)
    total = sum_of(w * (model - base) for w, model in zip(weights, models, strict=True))
    if normalize:
        total = total / (sum(weights) or 1.0)  # all weights 0: the base is unchanged
    return base + lambda_ * total
