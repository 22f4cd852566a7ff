"""Linear: the weighted mean of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import check_mean_weights, sum_of
from hf_transfer_ext.merging.arithmetic.fast import linear_by_kernels
from hf_transfer_ext.merging.method import Promises, for_each, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import PerModelCoefficient


def factors_of_changes(*, weight: Sequence[float], normalize: bool) -> list[float] | None:
    """w_i, divided by their sum with `normalize`; None for weights that also scale the base (their sum is not 1)."""
    total = sum(weight)
    return [one / total for one in weight] if normalize or abs(total - 1) < 1e-12 else None


@merge_method(
    base="none",
    check=check_mean_weights,
    fast=linear_by_kernels,
    change_factors=factors_of_changes,
    promises=Promises(alone={"weight": 0.7}, equal={"normalize": True}),
)
def linear(
    base: Float[Tensor, "*shape"] | None,
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient,
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    r"""The weighted mean of the models; a base model only provides its configuration.

    .. math:: \theta = \sum_i w_i \theta_i \Big/ \sum_i w_i

    When to use it: for checkpoints of one training run, or fine-tunes of one base on similar data (a model soup).

    Args:
        weight: w_i, any real number.
        normalize: Divide by the sum of the weights; otherwise, the result is the plain weighted sum.

    Returns:
        The merged weights.

    Raises:
        ValueError: The weights sum to 0 with `normalize`.

    Source: Model soups, Wortsman et al. 2022, https://arxiv.org/abs/2203.05482
    """
    weights = for_each(weight, models)
    total = sum_of(w * model for w, model in zip(weights, models, strict=True))
    return total / sum(weights) if normalize else total
