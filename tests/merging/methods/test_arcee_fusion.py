"""arcee_fusion against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from merging.method_cases import close, tensors

from hf_transfer_ext.merging import MERGE_METHODS

arcee_fusion = MERGE_METHODS["arcee_fusion"]


def softmax(row):
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [power / math.fsum(powers) + 1e-8 for power in powers]


def test_definition():
    base, models = tensors(1)
    importance = []
    for old, new in zip(base.double().tolist(), models[0].double().tolist(), strict=True):
        divergence = math.fsum(p * math.log(p / q) for p, q in zip(softmax(new), softmax(old), strict=True))
        importance.append([abs(a - b) * divergence for a, b in zip(new, old, strict=True)])
    ordered = sorted(value for row in importance for value in row)
    low, middle, high = (ordered[int(share * 59)] for share in (0.25, 0.5, 0.75))
    threshold = middle + 1.5 * (high - low)
    taken = torch.tensor([[value >= threshold for value in row] for row in importance])
    assert 0 < int(taken.sum()) < 30
    close(arcee_fusion(base, models), torch.where(taken, models[0], base).double())


def test_by_hand():
    base, model = torch.zeros(3, 2), torch.zeros(3, 2)
    model[1, 0] = 1.0
    model[0, 1] = 0.01
    # Five of six importances are 0 or nearly so; median and quartiles are 0, and zeros are no change.
    assert torch.equal(arcee_fusion(base, [model]), model)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5)])
def test_other_shapes(shape):
    base, models = tensors(1, shape)
    merged = arcee_fusion(base, models)
    assert merged.numel() == base.numel()
