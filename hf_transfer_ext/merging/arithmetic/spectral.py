"""Shared code for methods on singular vectors, which need whole tensors; only matrices have singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.types import Coefficient, Matrix, Weights


def add_mean(base: Weights, changes: Sequence[Weights], lambda_: Coefficient) -> Weights:
    """theta_0 + lambda * mean of the changes, for tensors that are not matrices."""
    return base + lambda_ * torch.stack(list(changes)).mean(0)


def svd(
    matrix: Matrix,
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, " rank"], Float[Tensor, "rank columns"]]:
    """U, S and V^T with min(rows, columns) singular values, computed in float64, returned in the matrix's dtype."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)


def nearest_orthogonal(matrix: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns (or rows): U V^T of the singular value decomposition."""
    orthogonal: Tensor = _NearestOrthogonal.apply(matrix)
    return orthogonal


class _NearestOrthogonal(torch.autograd.Function):
    """U V^T with a gradient that is also valid for equal singular values, unlike those of U and V.

    For a gradient H of the result, with B = U^T H V: U ((B - B^T)_ij / (s_i + s_j)) V^T, plus H scaled by S^-1 in the
    directions outside of U and V. Singular values of 0 have no gradient and give 0.
    """

    @staticmethod
    def forward(context: Any, matrix: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        context.save_for_backward(left, values, right)
        return (left @ right).to(matrix.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        left, values, right = context.saved_tensors
        slope = gradients[0].double()
        inner = left.T @ slope @ right.T
        inside = left @ ((inner - inner.T) * _inverse(values[:, None] + values)) @ right
        beside_left = (slope - left @ (left.T @ slope)) @ right.T * _inverse(values) @ right
        beside_right = left * _inverse(values) @ (left.T @ (slope - slope @ right.T @ right))
        return (inside + beside_left + beside_right).to(gradients[0].dtype)


def _inverse(values: Tensor) -> Tensor:
    """1 / s, and 0 for 0."""
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
