"""The step of `npo_sam` on two quadratics, whose gradients are known in closed form."""

import pytest
import torch
from losses.unlearning.methods.quadratics import Quadratics

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # The gradient is (3, -2), of length sqrt(13); the forget gradient there is a * (x + rho g / |g|).
    step, rho = Quadratics(), 0.1
    found = METHODS["npo_sam"](rho=rho).gradient(step)
    length = 13**0.5
    expected = [0.5 * 3 * (1 + rho * 3 / length) + 2 * 1, 0.5 * (-2 - rho * 2 / length) + 2 * 5]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert step.x.tolist() == [1.0, -2.0]


def test_without_a_radius_or_a_gradient_it_is_the_plain_sum():
    step = Quadratics()
    torch.testing.assert_close(METHODS["npo_sam"](rho=0.0).gradient(step)[0], 0.5 * step.a * step.x + 2 * step.b)
    step.x = torch.zeros(2, dtype=torch.float64)
    assert METHODS["npo_sam"](rho=1.0).gradient(step)[0].tolist() == [2.0, 10.0]
