"""karcher against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from merging.method_cases import close, tensors

from hf_transfer_ext.merging import MERGE_METHODS

karcher = MERGE_METHODS["karcher"]


def oracle(models, steps, tol=1e-5):
    vectors = torch.stack([model.double().reshape(-1) for model in models])
    norms = vectors.norm(dim=1)
    units = vectors / norms[:, None]
    point = units.mean(0) / units.mean(0).norm()
    for _ in range(steps):
        angles = (units @ point).clamp(-1, 1).arccos()
        moves = torch.stack([a / a.sin() * (u - point * a.cos()) for a, u in zip(angles, units, strict=True)])
        step = moves.mean(0)
        if step.norm() < tol:
            break
        point = point * step.norm().cos() + step / step.norm() * step.norm().sin()
    return (point * norms.mean()).reshape(models[0].shape)


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_definition(steps):
    _, models = tensors(spread=3.0)
    close(karcher(None, models, max_iter=steps), oracle(models, steps))


def test_by_hand():
    merged = karcher(None, [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])])
    assert merged.tolist() == pytest.approx([math.sqrt(2)] * 2)


def test_the_mean_has_no_slope_left():
    _, models = tensors(spread=3.0)
    merged = karcher(None, models, max_iter=100, tol=1e-9).double()
    unit = merged / merged.norm()
    slope = torch.zeros_like(unit)
    for model in models:
        other = model.double() / model.double().norm()
        angle = (unit * other).sum().arccos()
        slope += angle / angle.sin() * (other - unit * angle.cos())
    assert float(slope.norm()) < 1e-6


def test_zeros():
    zero, one = torch.zeros(2), torch.tensor([0.0, 2.0])
    assert torch.equal(karcher(None, [zero, zero]), zero)
    assert karcher(None, [zero, one]).tolist() == [0.0, 1.0]
