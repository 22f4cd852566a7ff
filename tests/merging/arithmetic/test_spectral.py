"""Decompositions in blocks of rows, against those of LAPACK in float64."""

from __future__ import annotations

import pytest
import torch

from hf_transfer_ext.merging.arithmetic import spectral
from hf_transfer_ext.merging.arithmetic.spectral import (
    inner_product,
    nearest_orthogonal,
    shared_basis,
    sum_of_changes,
    svd,
)

SHAPES = [(60, 12), (12, 60), (30, 30), (17, 1), (1, 17), (20, 14)]


def matrix_with(values, shape, seed=0):
    """A float32 matrix with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(values)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q for size in shape
    )
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).float()


def spread(shape, decades):
    """Singular values from 1 down by a number of decades."""
    return torch.logspace(0, -decades, min(shape), dtype=torch.float64).tolist()


@pytest.fixture(params=["blocks", "whole"])
def blocks(request, monkeypatch):
    if request.param == "blocks":
        monkeypatch.setattr(spectral, "BLOCK", 8)
        monkeypatch.setattr(spectral, "LEAST_ROWS", 5)


def is_identity(matrix, tolerance=1e-6):
    return torch.allclose(matrix.double(), torch.eye(len(matrix), dtype=torch.float64), atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decades", [1, 5])  # the eigenvectors of A^T A, and R of A = Q R
@pytest.mark.parametrize("kept", [None, 1])
def test_svd_is_that_of_lapack(blocks, shape, decades, kept):
    matrix = matrix_with(spread(shape, decades), shape)
    left, values, right = svd(matrix, kept)
    oracle = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert values.dtype == left.dtype == right.dtype == torch.float32
    assert torch.allclose(values.double(), oracle.S[:kept], atol=1e-7)
    product = left.double() * values.double() @ right.double()
    assert torch.allclose(product, oracle.U[:, :kept] * oracle.S[:kept] @ oracle.Vh[:kept], atol=1e-6)
    assert is_identity(left.T @ left) and is_identity(right @ right.T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decades", [1, 5])
def test_nearest_orthogonal_is_that_of_lapack(blocks, shape, decades):
    matrix = matrix_with(spread(shape, decades), shape)
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose(nearest_orthogonal(matrix).double(), left @ right, atol=2e-6)


@pytest.mark.parametrize("shape", [(60, 12), (12, 60), (20, 20)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_of_a_rank_deficient_matrix_all_vectors_are_orthonormal(blocks, shape, rank):
    matrix = matrix_with(spread((rank, 99), 2), shape) if rank else torch.zeros(shape)
    left, values, right = svd(matrix)
    assert is_identity(left.T @ left) and is_identity(right @ right.T)
    assert torch.allclose(left * values @ right, matrix, atol=1e-6)
    assert float(values[rank:].abs().max()) < 1e-7
    orthogonal = nearest_orthogonal(matrix)
    tall = orthogonal if shape[0] >= shape[1] else orthogonal.T
    assert is_identity(tall.T @ tall)
    # In the directions that the matrix has, it is the polar factor, whatever it is in the others.
    assert torch.allclose(orthogonal @ right[:rank].T, left[:, :rank], atol=2e-6)
    assert torch.equal(orthogonal, nearest_orthogonal(matrix))


@pytest.mark.parametrize("shape", [(60, 12), (12, 60)])
def test_zero_rows_and_columns(blocks, shape):
    """Of an embedding, only a few rows are trained."""
    matrix = torch.zeros(shape)
    matrix[3:6, 2:9] = matrix_with([2.0, 1.0, 0.5], (3, 7))
    left, values, right = svd(matrix)
    assert torch.allclose(values[:4], torch.tensor([2.0, 1.0, 0.5, 0.0]), atol=1e-6)
    assert is_identity(left.T @ left) and is_identity(right @ right.T)
    assert torch.allclose(left * values @ right, matrix, atol=1e-6)


def test_blocks_add_up_to_the_whole(monkeypatch):
    matrix = torch.randn(300, 7, generator=torch.Generator().manual_seed(1))
    whole = [*svd(matrix, 3), nearest_orthogonal(matrix)]
    monkeypatch.setattr(spectral, "BLOCK", 7)
    monkeypatch.setattr(spectral, "LEAST_ROWS", 11)
    parts = [*svd(matrix, 3), nearest_orthogonal(matrix)]
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [spread((1, 1), 0), spread((5, 5), 2), spread((40, 40), 9)])
def test_the_shared_basis_gives_the_matrix_back(blocks, shape, values):
    matrix = matrix_with(values[: min(shape)], shape)
    aligned, back = shared_basis(matrix)
    assert torch.allclose(back(aligned), matrix, atol=1e-6)
    energies = aligned.double() @ aligned.double().T  # S V^T V S
    assert torch.allclose(energies, torch.diag(energies.diagonal()), atol=1e-6)
    assert torch.allclose(energies.diagonal().sqrt(), torch.linalg.svdvals(matrix.double()), atol=1e-6)


def test_a_gradient_takes_the_way_of_lapack():
    matrix = torch.randn(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda one: svd(one, 2)[1], matrix)
    torch.autograd.gradcheck(nearest_orthogonal, matrix)
    aligned, back = shared_basis(matrix.float())
    (slope,) = torch.autograd.grad(back(aligned).sum(), matrix)
    assert torch.allclose(slope, torch.ones_like(slope), atol=1e-5)


def test_inner_product(blocks):
    one, other = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(inner_product(one, other), (one * other).sum())


def test_sum_of_changes():
    base, models = torch.ones(2), [torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0])]
    assert torch.equal(sum_of_changes(base, models), torch.tensor([1.0, 2.0]))
    assert torch.equal(base, torch.ones(2)) and torch.equal(models[0], torch.tensor([2.0, 4.0]))
