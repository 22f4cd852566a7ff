"""DELLA without sign election: drop small changes more often than large ones, and add the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.changes import sum_of
from hf_transfer_ext.merging.arithmetic.fast import della_linear_by_kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.arithmetic.trimming import check_della, drop_by_rank
from hf_transfer_ext.merging.method import PerModel, Promises, for_each, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import Coefficient, PerModelCoefficient


@merge_method(
    unit="row",
    check=check_della,
    fast=della_linear_by_kernels,
    promises=Promises(alone={"weight": 1}, any_order=False),
)
def della_linear(
    base: Float[Tensor, "rows columns"],
    models: Sequence[Float[Tensor, "rows columns"]],
    *,
    weight: PerModelCoefficient,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    rescale: bool = True,
    normalize: bool = False,
    lambda_: Coefficient = 1.0,
    noise: Noise = Noise(),  # noqa: B008
) -> Float[Tensor, "rows columns"]:
    r"""Drop elements at random, the small ones of a row more often (MAGPRUNE), and add the others.

    .. math::
        p_{ij} = d_i - \epsilon_i + 2 \epsilon_i \frac{r_{ij}}{n - 1}, \quad
        c_{ij} = w_i \, m_{ij} t_{ij} / p_{ij}, \quad m_{ij} \sim \mathrm{Bernoulli}(p_{ij})

    where r_ij is the rank of |t_ij| among the n elements of its row, 0 for the smallest; then the sum over the models.

    When to use it: as `dare_linear`, at densities so low that dropping blindly would lose the large changes.

    Args:
        weight: w_i.
        density: d_i, the mean probability that an element is kept; density +- epsilon must be in (0, 1).
        epsilon: Half the difference between the probabilities of the largest and the smallest element.
        rescale: Divide each element by its p, so that the expected change is preserved.
        normalize: Also divide by the sum of the weights.
        lambda_: Scale of the combined change (`lambda` in YAML).
        noise: Random numbers by element position.

    Returns:
        The merged weights. A one-dimensional tensor counts as one row.

    Deviations: magnitudes with equal leading bits are ranked by position (`trimming.drop_by_rank`). mergekit rescales
    all elements by the share of the L1 norm that was kept, instead of each by its probability.

    Source: DELLA-Merging, Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    weights = for_each(weight, models)
    changes = [model - base for model in models]
    sparse = [
        drop_by_rank(change, share, spread, rescale=rescale, noise=noise, model=i)
        for i, (change, share, spread) in enumerate(
            zip(changes, for_each(density, models), for_each(epsilon, models), strict=True)
        )
    ]
    merged = sum_of(w * change for w, change in zip(weights, sparse, strict=True))
    if normalize:
        merged = merged / (sum(weights) or 1.0)  # all weights 0: the base is unchanged
    return base + lambda_ * merged
