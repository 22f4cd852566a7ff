import pytest
import torch

from hf_transfer_ext.losses.unlearning import retain_hidden


def test_by_hand():
    hidden, reference = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert retain_hidden(hidden, reference).tolist() == pytest.approx([2.5, 0.0])
