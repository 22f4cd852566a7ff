"""multislerp against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from merging.method_cases import close, tensors

from hf_transfer_ext.merging import MERGE_METHODS

multislerp = MERGE_METHODS["multislerp"]


@pytest.mark.parametrize("with_base", [True, False])
def test_definition(with_base):
    base, models = tensors()
    origin = base.double() if with_base else torch.zeros_like(base).double()
    weights = torch.tensor([0.5, 0.3, 0.7], dtype=torch.float64) / 1.5
    vectors = torch.stack([(model.double() - origin).reshape(-1) for model in models])
    norms = vectors.norm(dim=1)
    units = vectors / norms[:, None]
    mean = weights @ units
    mean = mean / mean.norm()
    tangents = units - (units @ mean)[:, None] * mean
    step = weights @ tangents
    point = mean * math.cos(step.norm()) + step * math.sin(step.norm()) / step.norm()
    oracle = origin + (point * (weights * norms).sum()).reshape(base.shape)
    close(multislerp(base if with_base else None, models, weight=[0.5, 0.3, 0.7]), oracle)


def test_by_hand():
    merged = multislerp(None, [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])], weight=[1, 1])
    assert merged.tolist() == pytest.approx([math.sqrt(2)] * 2)  # the mean direction at the mean norm 2


def test_unchanged_tensors_stay_and_opposite_ones_are_refused():
    base, _ = tensors()
    assert torch.equal(multislerp(base, [base, base, base], weight=1), base)
    x = torch.tensor([1.0, 0.0])
    assert multislerp(None, [x, -2 * x], weight=[2, 2]).tolist() == [-0.5, 0.0]
    with pytest.raises(ValueError, match="cancel"):
        multislerp(None, [x, -2 * x, 0 * x], weight=[2, 2, 2])
