"""model_stock against its definition, for tensors and rows."""

from __future__ import annotations

import math

import pytest
import torch
from merging.method_cases import close, dot, pairs, tensors

from hf_transfer_ext.merging import MERGE_METHODS

model_stock = MERGE_METHODS["model_stock"]


def interpolate(base, models):
    changes = [model.double() - base.double() for model in models]
    k = len(models)
    cosines = [
        dot(changes[i], changes[j]) / math.sqrt(dot(changes[i], changes[i]) * dot(changes[j], changes[j]))
        for i, j in pairs(k)
    ]
    cosine = math.fsum(cosines) / len(cosines)
    share = k * cosine / (1 + (k - 1) * cosine)
    return share * sum(model.double() for model in models) / k + (1 - share) * base.double()


@pytest.mark.parametrize("count", [2, 3])
def test_definition(count):
    base, models = tensors(count)
    close(model_stock(base, models), interpolate(base, models))
    rows = [interpolate(base[i], [model[i] for model in models]) for i in range(len(base))]
    close(model_stock(base, models, filter_wise=True), torch.stack(rows))


def test_by_hand():
    base, models = torch.zeros(1, 2), [torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, math.sqrt(3)]])]
    # An angle of 60 degrees: r = 2 (1/2) / (1 + 1/2) = 2/3 of the way to the mean (1.5, sqrt(3) / 2).
    assert model_stock(base, models)[0].tolist() == pytest.approx([1.0, math.sqrt(3) / 3])


def test_right_angles_give_the_base_and_agreement_the_mean():
    base, one, two = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert torch.equal(model_stock(base, [one, two]), base)
    assert torch.allclose(model_stock(base, [one, one]), one)
    assert torch.equal(model_stock(one, [one, one]), one)
