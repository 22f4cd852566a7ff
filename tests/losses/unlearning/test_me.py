import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import me


def test_it_equals_the_definition():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64)
    expected = []
    for z in logits.tolist():
        p = [math.exp(x) / sum(map(math.exp, z)) for x in z]
        expected.append(sum(0.2 * math.log(0.2 / x) for x in p))
    assert me(logits).tolist() == pytest.approx(expected, rel=1e-10)


def test_by_hand_and_zero_where_all_tokens_are_equally_likely():
    assert me(torch.log(torch.tensor([[0.75, 0.25]]))).item() == pytest.approx(-0.5 * math.log(0.75), rel=1e-5)
    assert me(torch.full((2, 7), 3.0)).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
