"""fisher against its definition."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, extra_of, per_element, tensors

from hf_transfer_ext.merging import MERGE_METHODS

fisher, linear = MERGE_METHODS["fisher"], MERGE_METHODS["linear"]


def test_definition():
    _, models = tensors()
    extra = extra_of(fisher, models)["fisher"]
    extra[0][0] = 0.0  # below the floor

    def mean(*numbers):
        precisions = [w * max(f, 1e-3) for w, f in zip((0.5, 0.3, 0.7), numbers[3:], strict=True)]
        return sum(p * number for p, number in zip(precisions, numbers[:3], strict=True)) / sum(precisions)

    merged = fisher(None, models, weight=[0.5, 0.3, 0.7], fisher_floor=1e-3, fisher=extra)
    close(merged, per_element(mean, *models, *extra))


def test_by_hand():
    models = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, 4.0])]
    extra = [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])]
    # Three parts of the first to one of the second; where no model depends on the element, their mean.
    assert fisher(None, models, fisher=extra).tolist() == [2.0, 3.0]


def test_equal_diagonals_give_the_weighted_mean():
    _, models = tensors()
    merged = fisher(None, models, weight=[1, 2, 3], fisher=[torch.full_like(models[0], 0.2)] * 3)
    assert torch.allclose(merged, linear(None, models, weight=[1, 2, 3]), atol=1e-6)


def test_the_mean_minimizes_the_quadratic_losses():
    """The gradient of sum_i w_i F_i (theta - theta_i)^2 is 0."""
    _, models = tensors()
    extra = extra_of(fisher, models)["fisher"]
    merged = fisher(None, models, fisher=extra)
    slope = sum(2 * f * (merged - model) for f, model in zip(extra, models, strict=True))
    assert slope.abs().max() < 1e-5


def test_refused():
    _, models = tensors()
    with pytest.raises(ValueError, match="negative"):
        fisher(None, models, fisher=[-model.abs() for model in models])
    with pytest.raises(ValueError, match="one tensor for each model: got 2 for 3"):
        fisher(None, models, fisher=models[:2])
    with pytest.raises(TypeError, match="`fisher` needs `fisher`"):
        fisher(None, models)
