from itertools import pairwise

import pytest
import torch
from tiny_families import FAMILIES, logits_of, tiny_model

from hf_transfer_ext.students import uniform_depth
from hf_transfer_ext.students.inits.uniform_depth import evenly_spaced
from hf_transfer_ext.students.shape import StudentShape

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_teacher(family):
    teacher = tiny_model(family)
    assert torch.equal(logits_of(uniform_depth(teacher, StudentShape(depth=4)), IDS), logits_of(teacher, IDS))


def test_worked_by_hand():
    assert evenly_spaced(6, 3) == [0, 3, 5]
    assert evenly_spaced(18, 8) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert evenly_spaced(12, 2) == [0, 11]
    assert evenly_spaced(7, 1) == [0]


@pytest.mark.parametrize("depth", [1, 2, 5, 12, 33])
def test_spacing_is_even_without_repeats(depth):
    for count in range(1, depth + 1):
        kept = evenly_spaced(depth, count)
        steps = {b - a for a, b in pairwise(kept)}
        assert len(kept) == count and kept == sorted(set(kept)) and kept[0] == 0
        assert count == 1 or (kept[-1] == depth - 1 and max(steps) - min(steps) <= 1)


def test_more_layers_than_the_teacher_are_refused():
    with pytest.raises(ValueError, match="between 1 and 4, the depth of the teacher, got 5"):
        uniform_depth(tiny_model("llama"), StudentShape(depth=5))
