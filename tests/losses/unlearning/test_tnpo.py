import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import grad_ascent, tnpo


def test_it_equals_the_definition_with_a_weight_that_carries_no_gradient():
    p, reference, beta = [0.5, 0.1, 0.9], [0.25, 0.4, 0.9], 3.0
    log_probs = torch.log(torch.tensor(p, dtype=torch.float64)).requires_grad_(True)
    weights = [2 * a**beta / (a**beta + b**beta) for a, b in zip(p, reference, strict=True)]
    values = tnpo(log_probs, torch.log(torch.tensor(reference, dtype=torch.float64)), beta=beta)
    assert values.tolist() == pytest.approx([w * math.log(a) for w, a in zip(weights, p, strict=True)])
    values.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx(weights)


def test_where_the_models_agree_it_is_gradient_ascent():
    log_probs = torch.tensor([-0.5, -40.0])
    torch.testing.assert_close(tnpo(log_probs, log_probs), grad_ascent(log_probs))
