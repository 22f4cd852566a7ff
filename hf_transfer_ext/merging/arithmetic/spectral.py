"""Shared code for methods on singular vectors, which need whole tensors; only matrices have singular vectors.

A tall matrix A is never decomposed as a whole. Its right singular vectors V and singular values S come from a small
square matrix that is accumulated over blocks of rows, and the left ones are A V / S, block by block. Wide matrices are
transposed. Everything is computed in float64, and the square matrix is

- A^T A where the wanted singular values are at least sqrt(`GRAM_LIMIT`) of the largest one: its eigenvectors have an
  error of 2^-53 times the square of that ratio;
- otherwise R of A = Q R, whose error is 2^-53 times the ratio itself.

Both are below the rounding of float32. Singular values below `ZERO` of the largest one are smaller than the rounding
of the matrix: their left vectors are any orthonormal ones. LAPACK alone decomposes matrices in float64, those with
gradients, and for `nearest_orthogonal` those that are nearly square, whose smallest singular values are too small for
A^T A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.types import Coefficient, Matrix, Scalar, Weights

#: Smallest share of the largest eigenvalue of A^T A for which its eigenvectors are exact enough for float32.
GRAM_LIMIT = 2.0**-22

#: Share of the largest singular value below which another one counts as 0: the rounding of float32.
ZERO = 2.0**-24

#: Rows for each column, below which a matrix is nearly square.
NEARLY_SQUARE = 1.5

#: Elements of a block of rows; in float64, 32 MiB.
BLOCK = 1 << 22

#: Rows of a block of a wide matrix: products of fewer are slow.
LEAST_ROWS = 256


def add_mean(base: Weights, models: Sequence[Weights], lambda_: Coefficient) -> Weights:
    """theta_0 + lambda * mean of the changes, for tensors that are not matrices."""
    return base + lambda_ * torch.stack([model - base for model in models]).mean(0)


def sum_of_changes(base: Weights, models: Sequence[Weights]) -> Weights:
    """sum_i (theta_i - theta_0), in the order of the models, with one change in memory at a time."""
    total = models[0] - base
    for model in models[1:]:
        total = total.add_(model - base)
    return total


def inner_product(one: Matrix, other: Matrix) -> Scalar:
    """<A, B> = sum_ij A_ij B_ij, by blocks of rows."""
    return torch.stack([torch.linalg.vecdot(one[rows], other[rows]).sum() for rows in _blocks(one)]).sum()


def svd(
    matrix: Matrix, kept: int | None = None
) -> tuple[Float[Tensor, "rows kept"], Float[Tensor, " kept"], Float[Tensor, "kept columns"]]:
    """U, S and V^T of the largest singular values, computed in float64, returned in the matrix's dtype.

    Args:
        kept: Number of singular values, up to min(rows, columns); None for all.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = svd(matrix.T, kept)
        return left.T, values, right.T
    if _is_for_lapack(matrix):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        left, values, right = left[:, :kept], values[:kept], right[:kept]
    else:
        values, vectors = _right_vectors(matrix, kept)
        left, right = _left_vectors(matrix, values, vectors), vectors.T
    return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)


def shared_basis(matrix: Matrix) -> tuple[Float[Tensor, "rank columns"], Callable[[Tensor], Tensor]]:
    """S V^T of the singular value decomposition, and a function that multiplies a matrix by U from the left.

    What a small singular value contributes to U S V^T is as small as its error, so this needs A^T A only.
    """
    if _is_for_lapack(matrix):
        left, values, right = svd(matrix)
        return values[:, None] * right, lambda inner: left @ inner
    if matrix.shape[0] < matrix.shape[1]:
        left = torch.linalg.eigh(_inner(matrix.T, matrix.T))[1].flip(1).to(matrix.dtype)
        return left.T @ matrix, lambda inner: left @ inner
    energies, vectors = torch.linalg.eigh(_inner(matrix, matrix))
    values, vectors = energies.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    back = vectors * _inverse(values)
    aligned = (values[:, None] * vectors.T).to(matrix.dtype)
    return aligned, lambda inner: matrix @ (back @ inner.double()).to(matrix.dtype)


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
        context.save_for_backward(matrix)
        rows, columns = sorted(matrix.shape, reverse=True)
        if matrix.dtype == torch.float64 or rows < NEARLY_SQUARE * columns:
            left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
            return (left @ right).to(matrix.dtype)
        return _polar(matrix) if matrix.shape[0] >= matrix.shape[1] else _polar(matrix.T).T

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (matrix,) = context.saved_tensors
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        slope = gradients[0].double()
        inner = left.T @ slope @ right.T
        inside = left @ ((inner - inner.T) * _inverse(values[:, None] + values)) @ right
        beside_left = (slope - left @ (left.T @ slope)) @ right.T * _inverse(values) @ right
        beside_right = left * _inverse(values) @ (left.T @ (slope - slope @ right.T @ right))
        return (inside + beside_left + beside_right).to(gradients[0].dtype)


def _polar(matrix: Matrix) -> Matrix:
    """U V^T of a tall matrix, as A V S^-1 V^T where no singular value counts as 0."""
    values, vectors = _right_vectors(matrix)
    if values[-1] > ZERO * values[0]:
        return _product(matrix, vectors / values @ vectors.T)
    return _product(_left_vectors(matrix, values, vectors), vectors.T)


def _right_vectors(
    matrix: Matrix, kept: int | None = None
) -> tuple[Float[Tensor, " kept"], Float[Tensor, "columns kept"]]:
    """S and V for the largest singular values of a tall matrix, in float64."""
    energies, vectors = torch.linalg.eigh(_inner(matrix, matrix))  # ascending
    energies, vectors = energies.flip(0)[:kept], vectors.flip(1)[:, :kept]
    if bool((energies > GRAM_LIMIT * energies[:1]).all()):
        return energies.sqrt(), vectors
    _, values, right = torch.linalg.svd(_triangle(matrix), full_matrices=False)
    return values[:kept], right[:kept].T


def _left_vectors(
    matrix: Matrix, values: Float[Tensor, " kept"], vectors: Float[Tensor, "columns kept"]
) -> Float[Tensor, "rows kept"]:
    """A V / S, and orthonormal vectors for singular values that count as 0."""
    known = int((values > ZERO * values[:1]).sum())
    left = _product(matrix, vectors[:, :known] / values[:known])
    return left if known == len(values) else _completed(left, len(values))


def _completed(left: Float[Tensor, "rows known"], count: int) -> Float[Tensor, "rows count"]:
    """Append orthonormal columns, always the same, to those of a matrix, until there are `count`."""
    rows, known = left.shape
    if known == 0:
        return torch.eye(rows, count, dtype=left.dtype, device=left.device)
    free = torch.randn(rows, count - known, generator=torch.Generator().manual_seed(0)).to(left)
    for _ in range(2):  # once is not enough where few directions are left
        free -= _product(left, _inner(left, free))
        triangle = _triangle(free)
        one = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
        free = _product(free, torch.linalg.solve_triangular(triangle, one, upper=True))
    return torch.cat([left, free], dim=1)


def _is_for_lapack(matrix: Matrix) -> bool:
    return matrix.dtype == torch.float64 or matrix.requires_grad


def _blocks(matrix: Matrix, least: int = 0) -> Iterator[slice]:
    """Blocks of at least `least` rows."""
    rows, columns = matrix.shape
    step = max(least, LEAST_ROWS, BLOCK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def _inner(one: Float[Tensor, "rows left"], other: Float[Tensor, "rows right"]) -> Float[Tensor, "left right"]:
    """A^T B in float64; of A^T A, only the blocks on and above the diagonal are computed."""
    total = torch.zeros(one.shape[1], other.shape[1], dtype=torch.float64, device=one.device)
    parts = one.shape[1] // 4 if one is other else one.shape[1]
    for rows in _blocks(one):
        left = one[rows].double()
        right = left if one is other else other[rows].double()
        for start in range(0, one.shape[1], max(1, parts)):
            part = slice(start, start + max(1, parts))
            after = slice(start if one is other else 0, None)
            total[part, after].addmm_(left[:, part].T, right[:, after])
    return total.triu() + total.triu(1).T if one is other else total


def _triangle(matrix: Matrix) -> Float[Tensor, "columns columns"]:
    """R of A = Q R in float64, for a tall matrix: blocks of rows are added to the R of those before."""
    triangle = matrix.new_empty(0, matrix.shape[1], dtype=torch.float64)
    for rows in _blocks(matrix, 4 * matrix.shape[1]):
        triangle = torch.linalg.qr(torch.cat([triangle, matrix[rows].double()]), mode="r").R
    return triangle


def _product(
    matrix: Float[Tensor, "rows inner"], factor: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rows columns"]:
    """A B in float64, block by block, in the dtype of A."""
    result = matrix.new_empty(matrix.shape[0], factor.shape[1])
    for rows in _blocks(matrix):
        result[rows] = matrix[rows].double() @ factor.double()
    return result


def _inverse(values: Tensor) -> Tensor:
    """1 / s, and 0 for 0."""
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
