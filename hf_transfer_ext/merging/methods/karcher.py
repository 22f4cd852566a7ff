"""Karcher mean: the point on the sphere that minimizes the sum of squared distances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import weighted_sum
from hf_transfer_ext.merging.arithmetic.geometry import gram_of_models, norm_of, one_in_place_of_0, unit_gram
from hf_transfer_ext.merging.method import Promises, merge_method
from hf_transfer_ext.merging.types import Gram


@merge_method(base="member", statistics=gram_of_models, promises=Promises(alone={}, equal={}))
def karcher(
    base: Float[Tensor, "*shape"] | None,
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    gram: Gram,
) -> Float[Tensor, "*shape"]:
    r"""The Riemannian mean of the models' directions, scaled to the mean of their norms.

    .. math::
        u \leftarrow \cos(\|v\|) u + \sin(\|v\|) \frac{v}{\|v\|}, \quad
        v = \frac{1}{n} \sum_i \frac{\varphi_i}{\sin \varphi_i} (u_i - u \cos \varphi_i), \quad
        \cos \varphi_i = \langle u, u_i \rangle

    A base model is treated as another model.

    When to use it: as `multislerp`, where the order of the models and the choice of a center must not matter.

    Args:
        max_iter: Maximum number of steps.
        tol: Steps, angles and vectors with a norm below this count as 0.
        gram: Scalar products of the models.

    Returns:
        The merged weights.

    Source: Riemannian center of mass, Karcher 1977, https://doi.org/10.1002/cpa.3160300502
    """
    norms, units = unit_gram(gram)
    valid = (norms > tol).double()
    if not valid.any():
        return models[0] * 0.0
    shares = valid / valid.sum()
    length = norm_of(shares, units)
    # The point u is a linear combination of the directions, with the factors `point`.
    point = shares / length if length >= tol else torch.eye(len(models), dtype=torch.float64)[int(valid.argmax())]
    for _ in range(int(max_iter)):
        cosines = (units @ point).clamp(-1, 1)
        near = cosines.arccos() < tol
        angles = torch.where(near, torch.zeros_like(cosines), cosines).arccos()
        moves = torch.where(near, torch.zeros_like(angles), shares * angles / angles.sin().clamp(min=1e-300))
        step = moves - (moves * cosines).sum() * point
        size = norm_of(step, units)
        if size < tol:
            break
        point = size.cos() * point + size.sin() / size * step
        point = point / norm_of(point, units)
    factors = point * norms.mean() / one_in_place_of_0(norms)
    return weighted_sum(models, factors)
