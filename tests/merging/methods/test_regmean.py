"""regmean against its definition."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, tensors

from hf_transfer_ext.merging import MERGE_METHODS

regmean, linear = MERGE_METHODS["regmean"], MERGE_METHODS["linear"]


def activations(columns=10, count=3, rows=40):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(count)]


def grams(inputs):
    return [(one.T @ one).float() for one in inputs]


def test_definition():
    """The closed form, with every Gram matrix's off-diagonal elements scaled one by one."""
    _, models = tensors()
    total, right = torch.zeros(10, 10, dtype=torch.float64), torch.zeros(6, 10, dtype=torch.float64)
    for w, model, gram in zip((0.5, 0.3, 0.7), models, grams(activations()), strict=True):
        scaled = gram.double().clone()
        for i in range(10):
            for j in range(10):
                scaled[i, j] *= 1.0 if i == j else 0.4
        total += w * scaled
        right += w * model.double() @ scaled
    merged = regmean(None, models, weight=[0.5, 0.3, 0.7], off_diagonal=0.4, gram=grams(activations()))
    close(merged, right @ torch.linalg.inv(total))


def test_it_is_the_least_squares_solution():
    """The outputs of all models on their own inputs, fitted at once by a solver that knows no Gram matrix."""
    _, models = tensors()
    inputs = activations()
    outputs = torch.cat([x @ model.double().T for x, model in zip(inputs, models, strict=True)])
    fitted = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T
    close(regmean(None, models, off_diagonal=1.0, gram=grams(inputs)), fitted, 1e-5)


def test_by_hand():
    models = [torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 4.0]])]
    gram = [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0]))]
    # Three parts to one where inputs are 3 and 1; the second column has no influence, and gets the mean.
    assert regmean(None, models, gram=gram).tolist() == [[2.0, 3.0]]


def test_without_gram_matrices_it_is_the_weighted_mean():
    _, models = tensors()
    assert torch.allclose(regmean(None, models, weight=[1, 2, 3]), linear(None, models, weight=[1, 2, 3]), atol=1e-6)


def test_equal_gram_matrices_give_the_weighted_mean():
    _, models = tensors()
    merged = regmean(None, models, gram=grams(activations())[:1] * 3)
    close(merged, torch.stack(models).double().mean(0), 1e-5)


def test_singular_gram_matrices_are_refused():
    _, models = tensors()
    ones = torch.ones(10, 10)
    with pytest.raises(ValueError, match="Lower `off_diagonal`"):
        regmean(None, models, off_diagonal=1.0, gram=[ones] * 3)
    assert torch.isfinite(regmean(None, models, gram=[ones] * 3)).all()
