"""DARE with task arithmetic: drop most elements of each change at random, and add the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import check_weights, sum_of
from hf_transfer_ext.merging.arithmetic.fast import dare_linear_by_kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.method import PerModel, Promises, for_each, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import Coefficient, PerModelCoefficient


@merge_method(
    check=check_weights,
    fast=dare_linear_by_kernels,
    promises=Promises(alone={"weight": 1}, any_order=False),
)
def dare_linear(
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
    r"""Drop each element of a change with probability 1 - density, rescale the others, and add all changes.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i \, m_i t_i / d_i, \quad m_i \sim \mathrm{Bernoulli}(d_i)

    When to use it: for fine-tunes with many small, redundant changes; before anything else with a density of .5 or
    more.

    Args:
        weight: w_i.
        density: d_i, the probability that an element is kept; 0.1 is typical.
        rescale: Divide by d_i, so that the expected change is preserved.
        normalize: Also divide by the sum of the weights.
        lambda_: Scale of the combined change (`lambda` in YAML).
        noise: Random numbers by element position.

    Returns:
        The merged weights.

    Deviations: none. mergekit divides by the share of the L1 norm that was actually kept, which has the same
    expectation for large tensors and depends on the tensor for small ones.

    Source: Language models are super Mario, Yu et al. 2024, https://arxiv.org/abs/2311.03099
    """
    weights, densities = for_each(weight, models), for_each(density, models)
    changes = [model - base for model in models]
    sparse = [
        change * noise.keep(i, change, d) / (d if rescale and d > 0 else 1.0)
        for i, (change, d) in enumerate(zip(changes, densities, strict=True))
    ]
    merged = sum_of(w * change for w, change in zip(weights, sparse, strict=True))
    if normalize:
        merged = merged / (sum(weights) or 1.0)  # all weights 0: the base is unchanged
    return base + lambda_ * merged
