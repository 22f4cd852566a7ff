import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import grad_ascent


def test_a_step_down_its_gradient_lowers_the_answers_logit():
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    loss = grad_ascent(torch.log_softmax(logits, -1)[:, 1])
    assert loss.item() == pytest.approx(math.log(0.75))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.25]], dtype=torch.float64))  # 1 - p
