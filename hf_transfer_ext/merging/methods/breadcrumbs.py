"""Model breadcrumbs: of each change drop the largest outliers and the small rest."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.changes import add_changes, changes_of, check_weights
from hf_transfer_ext.merging.method import PerModel, merge_method
from hf_transfer_ext.merging.selection import keep_magnitudes
from hf_transfer_ext.merging.trimming import inner_magnitudes


@merge_method(statistics=inner_magnitudes, check=check_weights)
def breadcrumbs(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    normalize: bool = False,
    lambda_: float = 1.0,
    bounds: Sequence[tuple[float, float]],
) -> Float[Tensor, "*shape"]:
    r"""Keep the middle of each change by magnitude, and add all of it.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i \, t_i [l_i \le |t_i| \le h_i]

    Args:
        weight: w_i.
        density: Share of the elements that is kept in each tensor; 1 keeps everything.
        gamma: Share of the largest elements that is dropped first; 0.006 to 0.01 is typical.
        normalize: Also divide by the sum of the weights.
        lambda_: Strength of the whole change (`lambda` in YAML); the paper's alpha.
        bounds: (l_i, h_i), the smallest and the largest magnitude that is kept.

    Returns:
        The merged weights.

    Deviations: the paper masks each row, this each tensor, as mergekit does. Elements that tie with a kept one are
    kept. A `gamma` that drops no element keeps the rest as it should; mergekit then drops all.

    Source: Model breadcrumbs, Davari and Belilovsky 2024, https://arxiv.org/abs/2312.06795
    """
    kept = [keep_magnitudes(change, *pair) for change, pair in zip(changes_of(base, models), bounds, strict=True)]
    return add_changes(base, kept, weight, normalize=normalize, lambda_=lambda_)
