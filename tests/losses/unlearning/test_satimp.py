import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import satimp, wga


def test_by_hand_with_a_weight_that_carries_no_gradient():
    log_probs = torch.log(torch.tensor([0.5, 0.25], dtype=torch.float64)).requires_grad_(True)
    values = satimp(log_probs, beta1=2.0, beta2=1.0)
    assert values.tolist() == pytest.approx([0.125 * math.log(0.5), 0.0625 * 0.75 * math.log(0.25)])
    values.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0.125, 0.0625 * 0.75])


def test_without_importance_it_is_wga_and_a_certain_token_does_not_push():
    log_probs = torch.tensor([-1.0, -3.0])
    torch.testing.assert_close(satimp(log_probs, beta1=1.0, beta2=0.0), wga(log_probs))
    assert satimp(torch.tensor([0.0])).item() == 0.0
