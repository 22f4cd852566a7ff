"""What the methods on singular vectors share. They see a tensor as a whole; only matrices have singular vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import Weights
from hf_transfer_ext.merging.method import Coefficient

Matrix = Float[Tensor, "rows columns"]


def add_mean(base: Weights, changes: Sequence[Weights], lambda_: Coefficient) -> Weights:
    """theta_0 + lambda * mean of the changes: what the methods do with tensors that are not matrices."""
    return base + lambda_ * torch.stack(list(changes)).mean(0)


def svd(
    matrix: Matrix,
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, " rank"], Float[Tensor, "rank columns"]]:
    """U, S and V^T with min(rows, columns) singular values, calculated in float64, in the dtype of the matrix."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)


def nearest_orthogonal(matrix: Matrix) -> Matrix:
    """The matrix with orthonormal columns (or rows) that is nearest: U V^T of its singular value decomposition."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left @ right).to(matrix.dtype)
