import pytest
import torch

from hf_transfer_ext.losses.unlearning import rmu


def test_by_hand():
    control = torch.tensor([0.6, 0.8])
    hidden = torch.tensor([[1.2, 1.6], [0.0, 0.0], [2.2, 1.6]])
    assert rmu(hidden, control, scale=2.0).tolist() == pytest.approx([0.0, 2.0, 0.5], abs=1e-6)
