"""slerp against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from merging.method_cases import close, dot, tensors

from hf_transfer_ext.merging import MERGE_METHODS

slerp = MERGE_METHODS["slerp"]


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_definition(t):
    base, models = tensors(1, spread=2.0)
    angle = math.acos(dot(base, models[0]) / math.sqrt(dot(base, base) * dot(models[0], models[0])))
    oracle = (
        math.sin((1 - t) * angle) / math.sin(angle) * base.double()
        + math.sin(t * angle) / math.sin(angle) * models[0].double()
    )
    close(slerp(base, models, t=t), oracle)


def test_by_hand():
    merged = slerp(torch.tensor([1.0, 0.0]), [torch.tensor([0.0, 2.0])], t=1 / 3)
    assert merged.tolist() == pytest.approx([math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)])


def test_parallel_vectors_and_zeros_are_interpolated_on_a_line():
    base = torch.tensor([1.0, 2.0])
    assert slerp(base, [3 * base], t=0.25).tolist() == [1.5, 3.0]
    assert torch.equal(slerp(torch.zeros(2), [torch.zeros(2)], t=0.25), torch.zeros(2))
