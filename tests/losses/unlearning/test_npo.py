import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import npo


def oracle(nll, reference, beta):
    """-(2 / beta) ln sigmoid(-beta ln(pi / pi_ref)), with the probabilities of whole answers."""
    ratio = math.exp(-nll) / math.exp(-reference)
    return -(2 / beta) * math.log(1 / (1 + ratio**beta))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_it_equals_the_definition(beta):
    torch.manual_seed(0)
    nll, reference = torch.rand(5, dtype=torch.float64) * 20, torch.rand(5, dtype=torch.float64) * 20
    expected = [oracle(float(a), float(b), beta) for a, b in zip(nll, reference, strict=True)]
    assert npo(nll, reference, beta=beta).tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand():
    # The answer is now 1 / 3 as likely and beta is 1: -2 ln(1 / (1 + 1/3)) = 2 ln(4 / 3).
    value = npo(torch.tensor([math.log(3.0)]), torch.tensor([0.0]), beta=1.0)
    assert value.item() == pytest.approx(2 * math.log(4 / 3), rel=1e-6)


def test_where_the_models_agree_it_is_two_over_beta_times_ln_two():
    nll = torch.tensor([3.0, 8.0])
    assert npo(nll, nll, beta=0.1).tolist() == pytest.approx([20 * math.log(2)] * 2)


def test_its_gradient_is_that_of_gradient_ascent_at_first_and_fades():
    for difference, factor in [(0.0, 1.0), (50.0, 2 / (1 + math.exp(5.0))), (1000.0, 0.0)]:
        nll = torch.tensor([difference], dtype=torch.float64, requires_grad=True)
        npo(nll, torch.zeros(1, dtype=torch.float64), beta=0.1).sum().backward()
        assert nll.grad.item() == pytest.approx(-factor, rel=1e-9, abs=1e-12)
