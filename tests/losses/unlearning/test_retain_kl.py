import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import retain_kl


def test_it_equals_the_definition():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = []
    for z, r in zip(logits.tolist(), reference.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, z)) for x in z]
        q = [math.exp(x) / sum(map(math.exp, r)) for x in r]
        expected.append(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
    assert retain_kl(logits, reference).tolist() == pytest.approx(expected, rel=1e-10)


def test_by_hand_the_reference_comes_first():
    logits, reference = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.75, 0.25]]))
    assert retain_kl(logits, reference).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_zero_where_the_models_agree():
    logits = torch.randn(3, 5)
    assert retain_kl(logits, logits).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
