import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import jensun


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_it_equals_the_definition():
    torch.manual_seed(0)
    logits, refusal = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2])
    expected = []
    for z, r in zip(logits.tolist(), refusal.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, z)) for x in z]
        e = [float(v == r) for v in range(5)]
        m = [(a + b) / 2 for a, b in zip(p, e, strict=True)]
        expected.append(0.5 * kl(p, m) + 0.5 * kl(e, m))
    assert jensun(logits, refusal).tolist() == pytest.approx(expected, rel=1e-10)


def test_it_is_bounded_and_zero_on_a_certain_refusal():
    logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], dtype=torch.float64)
    assert jensun(logits, torch.tensor([0, 0])).tolist() == pytest.approx([0.0, math.log(2.0)], abs=1e-12)


def test_by_hand():
    # p_r = 1/2 of two tokens: m = (3/4, 1/4).
    value = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) + 0.5 * math.log(4 / 3)
    assert jensun(torch.zeros(1, 2), torch.tensor([0])).item() == pytest.approx(value, rel=1e-6)
