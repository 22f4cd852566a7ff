import pytest
import torch

from hf_transfer_ext.evals.audit.attacks.quantization import rounded


def test_by_hand():
    # Three bits: levels -3..3 in steps of a third of the largest weight.
    weight = torch.tensor([[0.9, -0.9, 0.31, 0.44, 0.46]])
    assert rounded(weight, 3, block=8).tolist()[0] == pytest.approx([0.9, -0.9, 0.3, 0.3, 0.6])


def test_each_block_has_its_own_scale_and_the_shape_stays():
    weight = torch.tensor([[8.0, 0.1, 0.02, 0.011, 0.02]])
    # In the second block one step is .02 / 7, and .011 is nearest to four of them.
    expected = [8.0, 0.0, 0.02, 4 * 0.02 / 7, 0.02]
    assert rounded(weight, 4, block=2).tolist()[0] == pytest.approx(expected, abs=1e-6)
    weight = torch.randn(6, 100)
    assert rounded(weight, 8).shape == (6, 100)
    assert (rounded(weight, 8) - weight).abs().max() < (rounded(weight, 4) - weight).abs().max() < 0.6
