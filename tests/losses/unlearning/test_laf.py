import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import laf

LENGTHS = [2, 3]


def states():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(5, 4, dtype=torch.float64, generator=draw) for _ in range(3)]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def parts_by_loops(hidden, rebuilt, reference):
    """(e^(m / (m + 1)), 1 - cosine) of each token."""
    found = []
    for h, r, ref in zip(hidden.tolist(), rebuilt.tolist(), reference.tolist(), strict=True):
        m = sum((x - y) ** 2 for x, y in zip(h, r, strict=True)) / sum(x * x for x in ref)
        found.append((math.exp(m / (m + 1)), 1 - cosine(h, ref)))
    return found


def test_it_equals_the_definition_by_loops():
    tokens = parts_by_loops(*states())
    expected, at = [], 0
    for length in LENGTHS:
        own = tokens[at : at + length]
        at += length
        contrast = math.log(sum(math.exp(c / 2.0) for _, c in own) / length)
        expected.append(-sum(s for s, _ in own) / length - 0.7 * contrast)
    found = laf(*states(), torch.tensor(LENGTHS).double(), temperature=2.0, contrast=0.7)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_where_nothing_has_moved_and_all_is_rebuilt_it_is_minus_one():
    hidden, *_ = states()
    assert laf(hidden, hidden, hidden, torch.tensor(LENGTHS).double()).tolist() == pytest.approx([-1.0, -1.0])


def test_it_is_bounded_however_far_a_state_runs():
    hidden, rebuilt, reference = states()
    found = laf(1e6 * hidden, rebuilt, reference, torch.tensor(LENGTHS).double(), contrast=0.0)
    assert bool((found >= -math.e).all()) and found.tolist() == pytest.approx([-math.e] * 2, rel=1e-6)
