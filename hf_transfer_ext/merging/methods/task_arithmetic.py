"""Task arithmetic: the base model plus the weighted sum of all changes."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import check_weights
from hf_transfer_ext.merging.arithmetic.masks import Mask, merge_masked_changes
from hf_transfer_ext.merging.method import PerModel, merge_method


@merge_method(check=check_weights, stored=True)
def task_arithmetic(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModel,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Add what each model learned to the base; a negative weight takes it away.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)

    Args:
        weight: w_i, any real number.
        normalize: Also divide by the sum of the weights.
        lambda_: Strength of the whole change (`lambda` in YAML).

    Returns:
        The merged weights.

    Source: Editing models with task arithmetic, Ilharco et al. 2023, https://arxiv.org/abs/2212.04089
    """
    everything = [Mask()] * len(models)
    return merge_masked_changes(base, models, weight, everything, elect=False, normalize=normalize, lambda_=lambda_)
