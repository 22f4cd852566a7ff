import pytest
import torch

from hf_transfer_ext.losses.unlearning import flat_logits


def test_it_equals_the_definition():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64)
    expected = [(max(z) - sum(z) / 5) ** 2 for z in logits.tolist()]
    assert flat_logits(logits).tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand_and_zero_where_all_logits_are_equal():
    assert flat_logits(torch.tensor([[4.0, 1.0, 1.0], [7.0, 7.0, 7.0]])).tolist() == pytest.approx([4.0, 0.0])
