"""Linear: the weighted mean of models."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import check_mean_weights, weighted_sum
from hf_transfer_ext.merging.method import PerModel, for_each, merge_method


@merge_method(base="none", check=check_mean_weights, stored=True)
def linear(
    base: Float[Tensor, "*shape"] | None,
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModel,
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    r"""The weighted mean of the models; a base model only lends its configuration.

    .. math:: \theta = \sum_i w_i \theta_i \Big/ \sum_i w_i

    Args:
        weight: w_i, any real number.
        normalize: Divide by the sum of the weights; without it the plain weighted sum.

    Returns:
        The merged weights.

    Raises:
        ValueError: The weights sum to 0 under `normalize`.

    Source: Model soups, Wortsman et al. 2022, https://arxiv.org/abs/2203.05482
    """
    total = weighted_sum(models, weight)
    return total.div_(sum(for_each(weight, models))) if normalize else total
