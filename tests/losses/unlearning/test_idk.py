import pytest
import torch

from hf_transfer_ext.losses.unlearning import idk


def test_by_hand_each_refusal_counts_alike():
    assert idk(torch.tensor([6.0, 2.0]), torch.tensor([3.0, 1.0])).tolist() == pytest.approx([2.0, 2.0])
