"""DARE with TIES: drop most elements of each change at random, then elect a sign and add the agreeing ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import check_weights, elect_sign, one_for_zero, sum_of
from hf_transfer_ext.merging.arithmetic.fast import dare_ties_by_kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.method import PerModel, Promises, for_each, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import Coefficient, PerModelCoefficient


@merge_method(
    check=check_weights,
    fast=dare_ties_by_kernels,
    promises=Promises(alone={"weight": 1}, any_order=False),
)
def dare_ties(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient,
    density: PerModel = 1.0,
    rescale: bool = True,
    normalize: bool = False,
    lambda_: Coefficient = 1.0,
    noise: Noise = Noise(),  # noqa: B008
) -> Float[Tensor, "*shape"]:
    r"""Drop each element of a change with probability 1 - density, rescale the others, add those that agree in sign.

    .. math::
        c_i = w_i \, m_i t_i / d_i, \quad s = \mathrm{sign} \sum_i c_i, \quad
        \theta = \theta_0 + \lambda \sum_{i: c_i s > 0} c_i

    When to use it: as `dare_linear`, where the fine-tunes also disagree in sign.

    Args:
        weight: w_i.
        density: d_i, the probability that an element is kept; 0.1 is typical.
        rescale: Divide by d_i, so that the expected change is preserved.
        normalize: Divide by the sum of the weights of the agreeing changes.
        lambda_: Scale of the combined change (`lambda` in YAML).
        noise: Random numbers by element position.

    Returns:
        The merged weights.

    Deviations: as in `dare_linear` for the scale, and as in `ties` for changes that cancel.

    Source: Language models are super Mario, Yu et al. 2024, https://arxiv.org/abs/2311.03099
    """
    weights, densities = for_each(weight, models), for_each(density, models)
    changes = [model - base for model in models]
    sparse = [
        change * noise.keep(i, change, d) / (d if rescale and d > 0 else 1.0)
        for i, (change, d) in enumerate(zip(changes, densities, strict=True))
    ]
    votes = [w * change for w, change in zip(weights, sparse, strict=True)]
    sign = elect_sign(votes)
    agreeing = [(vote * sign).relu() for vote in votes]  # magnitudes of the votes with the elected sign, 0 elsewhere
    merged = sign * sum_of(agreeing)
    if normalize:
        merged = merged / one_for_zero(sum_of(w * one.sign() for w, one in zip(weights, agreeing, strict=True)))
    return base + lambda_ * merged
