"""SCE: select elements by variance, calculate weights from energies, erase elements that disagree in sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import elect_sign, one_for_zero, sum_of
from hf_transfer_ext.merging.arithmetic.fast import sce_by_kernels
from hf_transfer_ext.merging.arithmetic.variance import energies_and_threshold, variance_of
from hf_transfer_ext.merging.method import Promises, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@merge_method(statistics=energies_and_threshold, fast=sce_by_kernels, promises=Promises(alone={}))
def sce(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    select_topk: float = 1.0,
    threshold: float,
    shares: Sequence[float | Float[Tensor, ""]],
) -> Float[Tensor, "*shape"]:
    r"""Merge the changes whose variance over the models is largest, each model weighted by its mean squared change.

    .. math::
        \hat t_i = t_i [\mathrm{Var}_i(t) \ge q], \quad w_i \propto \mathrm{mean}(\hat t_i^2), \quad
        \theta = \theta_0 + \sum_{i: \hat t_i s > 0} w_i \hat t_i \Big/ \sum_{i: \hat t_i s > 0} w_i, \quad
        s = \mathrm{sign} \sum_i \hat t_i

    When to use it: for a few fine-tunes of different tasks, without tuning the weights by hand.

    Args:
        select_topk: Share of the elements with a variance above 0 to keep.
        threshold: q, the smallest kept variance.
        shares: w_i of the tensor, which sum to 1.

    Returns:
        The merged weights.

    Deviations: elements that tie with the smallest kept variance are all kept. mergekit gives all models the same
    weight if the mean squares sum to less than 1e-6, as for most fine-tunes; here, only if no model changed.

    Source: FuseChat, Wan et al. 2024, https://arxiv.org/abs/2408.07990
    """
    varies = variance_of(models) >= threshold
    changes = [(model - base) * varies for model in models]
    sign = elect_sign(changes)
    agreeing = [(change * sign).relu() for change in changes]  # magnitudes of those with the elected sign, 0 elsewhere
    merged = sign * sum_of(share * one for share, one in zip(shares, agreeing, strict=True))
    return base + merged / one_for_zero(
        sum_of(share * one.sign() for share, one in zip(shares, agreeing, strict=True))
    )
