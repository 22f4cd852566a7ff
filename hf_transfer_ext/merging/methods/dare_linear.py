"""DARE with task arithmetic: drop most of each change at random, and add what is left."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import check_weights
from hf_transfer_ext.merging.arithmetic.masks import merge_masked_changes, random_masks
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.method import PerModel, merge_method


@merge_method(check=check_weights, stored=True)
def dare_linear(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    rescale: bool = True,
    normalize: bool = False,
    lambda_: float = 1.0,
    noise: Noise = Noise(),  # noqa: B008
) -> Float[Tensor, "*shape"]:
    r"""Drop each element of a change with probability 1 - density, rescale the others, and add all changes.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i \, m_i t_i / d_i, \quad m_i \sim \mathrm{Bernoulli}(d_i)

    Args:
        weight: w_i.
        density: d_i, the probability that an element is kept; 0.1 is typical.
        rescale: Divide by d_i, so that the expected change stays.
        normalize: Also divide by the sum of the weights.
        lambda_: Strength of the whole change (`lambda` in YAML).
        noise: Random numbers of the elements' places.

    Returns:
        The merged weights.

    Deviations: none. mergekit divides by the share of the L1 norm that happened to be kept, which has the
    same expectation for large tensors and depends on the tensor for small ones.

    Source: Language models are super Mario, Yu et al. 2024, https://arxiv.org/abs/2311.03099
    """
    masks = random_masks(density, models, rescale=rescale)
    return merge_masked_changes(
        base, models, weight, masks, elect=False, normalize=normalize, lambda_=lambda_, noise=noise
    )
