"""Multi-slerp: the spherical mean of several models, in the tangent space of their mean direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import check_multislerp, weighted_sum
from hf_transfer_ext.merging.arithmetic.geometry import gram_of_models, norm_of, one_in_place_of_0, unit_gram
from hf_transfer_ext.merging.method import Promises, for_each, merge_method
from hf_transfer_ext.merging.types import Gram, PerModelCoefficient


@merge_method(
    base="optional",
    statistics=gram_of_models,
    check=check_multislerp,
    promises=Promises(alone={"weight": 0.7}, equal={"normalize_weights": True}),
)
def multislerp(
    base: Float[Tensor, "*shape"] | None,
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    gram: Gram,
) -> Float[Tensor, "*shape"]:
    r"""Interpolate any number of models on the hypersphere, relative to the base if there is one.

    .. math::
        u_i = x_i / \|x_i\|, \quad \mu = \frac{\sum_i w_i u_i}{\|\sum_i w_i u_i\|}, \quad
        v = \sum_i w_i (u_i - \langle u_i, \mu \rangle \mu), \quad
        x = \Big(\mu \cos \|v\| + v \frac{\sin \|v\|}{\|v\|}\Big) \sum_i w_i \|x_i\|

    where x_i are the models, or their changes from the base, which is then added.

    When to use it: as `slerp`, for more than two models.

    Args:
        weight: w_i.
        normalize_weights: Divide the weights by their sum.
        eps: A mean with a norm below this has no direction.
        gram: Scalar products of the x_i.

    Returns:
        The merged weights; two opposite vectors are interpolated linearly.

    Raises:
        ValueError: The weighted directions of more than two vectors cancel.

    Source: Multi-SLERP, Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
    """
    vectors = list(models) if base is None else [model - base for model in models]
    origin = 0.0 if base is None else base
    if len(vectors) == 1:
        return vectors[0] + origin
    weights = torch.stack([torch.as_tensor(w, dtype=torch.float64) for w in for_each(weight, models)])
    if normalize_weights:
        weights = weights / weights.sum()
    norms, units = unit_gram(gram)
    length = norm_of(weights, units)
    if length < eps:
        if len(vectors) > 2 and bool(norms.any()):
            raise ValueError("The weighted directions of the models cancel out. Choose other weights.")
        return weighted_sum(vectors, weights) + origin
    mean = weights / length  # from here on, vectors are represented by their coefficients of the u_i
    tangent = weights - (weights @ units @ mean) * mean
    size = norm_of(tangent, units)
    point = mean * size.cos() + tangent * (size.sin() / size if size > 0 else 1.0)
    factors = point * (weights * norms).sum() / one_in_place_of_0(norms)
    return weighted_sum(vectors, factors) + origin
