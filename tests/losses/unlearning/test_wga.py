import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import grad_ascent, wga


def test_by_hand_with_a_weight_that_carries_no_gradient():
    log_probs = torch.log(torch.tensor([0.5, 0.1], dtype=torch.float64)).requires_grad_(True)
    values = wga(log_probs, beta=2.0)
    assert values.tolist() == pytest.approx([0.25 * math.log(0.5), 0.01 * math.log(0.1)])
    values.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0.25, 0.01])


def test_without_weight_it_is_gradient_ascent():
    log_probs = torch.tensor([-1.0, -7.0])
    torch.testing.assert_close(wga(log_probs, beta=0.0), grad_ascent(log_probs))
