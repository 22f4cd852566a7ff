import pytest
import torch

from hf_transfer_ext.losses.unlearning import retain_dmm


def test_by_hand():
    # p = 3/4 and 1/2: margins ln 3 and 0, their mean against a target of 0.
    log_probs = torch.tensor([0.75, 0.5]).double().log()
    loss = retain_dmm(log_probs, torch.tensor([2.0]).double(), torch.tensor([0.0]).double())
    assert loss.item() == pytest.approx((torch.tensor(3.0).log().item() / 2) ** 2, rel=1e-6)
