"""Model breadcrumbs: of each change drop the largest outliers and the small rest."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import check_weights
from hf_transfer_ext.merging.arithmetic.masks import Mask, merge_masked_changes
from hf_transfer_ext.merging.arithmetic.rescaling import inner_magnitudes_and_scales
from hf_transfer_ext.merging.method import PerModel, merge_method


@merge_method(statistics=inner_magnitudes_and_scales, check=check_weights, stored=True)
def breadcrumbs(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    rescale: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
    bounds: Sequence[tuple[float, float]],
    scales: Sequence[float],
) -> Float[Tensor, "*shape"]:
    r"""Keep the middle of each change by magnitude, and add all of it.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i \, t_i [l_i \le |t_i| \le h_i]

    Args:
        weight: w_i.
        density: Share of the elements that is kept in each tensor; 1 keeps everything.
        gamma: Share of the largest elements that is dropped first; 0.006 to 0.01 is typical.
        rescale: Multiply the kept part of each change, tensor by tensor, to the sum of magnitudes it had before.
        normalize: Also divide by the sum of the weights.
        lambda_: Strength of the whole change (`lambda` in YAML); the paper's alpha.
        bounds: (l_i, h_i), the smallest and the largest magnitude that is kept.
        scales: Factors of the kept parts; 1 without `rescale`.

    Returns:
        The merged weights.

    Deviations: the paper masks each row, this each tensor, as mergekit does. Elements that tie with a kept one are
    kept.

    Source: Model breadcrumbs, Davari and Belilovsky 2024, https://arxiv.org/abs/2312.06795
    """
    masks = [Mask(low=low, high=high, scale=scale) for (low, high), scale in zip(bounds, scales, strict=True)]
    return merge_masked_changes(base, models, weight, masks, elect=False, normalize=normalize, lambda_=lambda_)
