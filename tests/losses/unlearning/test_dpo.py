import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import dpo, npo


def test_it_equals_the_definition():
    torch.manual_seed(0)
    nll, ref, alt, ref_alt = torch.rand(4, 6, dtype=torch.float64) * 10
    beta = 0.3
    expected = []
    for lose, lose_ref, win, win_ref in zip(*(x.tolist() for x in (nll, ref, alt, ref_alt)), strict=True):
        margin = (math.log(math.exp(-win) / math.exp(-win_ref))) - (math.log(math.exp(-lose) / math.exp(-lose_ref)))
        expected.append(-(2 / beta) * math.log(1 / (1 + math.exp(-beta * margin))))
    assert dpo(nll, ref, alt, ref_alt, beta=beta).tolist() == pytest.approx(expected, rel=1e-10)


def test_by_hand():
    # The alternative gained ln 2, the answer lost ln 2, beta 1: -2 ln(sigmoid(2 ln 2)) = 2 ln(5 / 4).
    two = math.log(2.0)
    value = dpo(torch.tensor([two]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([two]), beta=1.0)
    assert value.item() == pytest.approx(2 * math.log(5 / 4), rel=1e-6)


def test_an_alternative_that_does_not_move_leaves_npo():
    nll, reference, still = torch.tensor([5.0, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([4.0, 4.0])
    torch.testing.assert_close(dpo(nll, reference, still, still), npo(nll, reference))
