"""nuslerp against its definition, for tensors, rows and columns."""

from __future__ import annotations

import math

import pytest
import torch
from merging.method_cases import close, dot, tensors

from hf_transfer_ext.merging import MERGE_METHODS

nuslerp = MERGE_METHODS["nuslerp"]


def interpolate(one, two, t):
    angle = math.acos(max(-1, min(1, dot(one, two) / math.sqrt(dot(one, one) * dot(two, two)))))
    a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return a * one.double() + b * two.double()


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("reading", ["tensor", "rows", "columns"])
def test_definition(with_base, reading):
    base, models = tensors(2)
    origin = base.double() if with_base else torch.zeros_like(base).double()
    one, two = (model.double() - origin for model in models)
    if reading == "tensor":
        oracle = interpolate(one, two, 0.375)
    elif reading == "rows":
        oracle = torch.stack([interpolate(a, b, 0.375) for a, b in zip(one, two, strict=True)])
    else:
        oracle = torch.stack([interpolate(a, b, 0.375) for a, b in zip(one.T, two.T, strict=True)]).T
    options = {"nuslerp_flatten": reading == "tensor", "nuslerp_row_wise": reading == "columns"}
    close(nuslerp(base if with_base else None, models, weight=[0.5, 0.3], **options), origin + oracle)


def test_by_hand():
    merged = nuslerp(None, [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])], weight=[1, 1])
    assert merged[0].tolist() == pytest.approx([math.sqrt(0.5)] * 2)


def test_parallel_vectors_are_interpolated_on_a_line():
    one = torch.tensor([[1.0, 2.0]])
    assert nuslerp(None, [one, 3 * one], weight=[3, 1]).tolist() == [[1.5, 3.0]]
