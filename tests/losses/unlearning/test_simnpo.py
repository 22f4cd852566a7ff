import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import simnpo


@pytest.mark.parametrize("beta, delta", [(4.5, 0.0), (2.5, 0.5)])
def test_it_equals_the_definition(beta, delta):
    nll, lengths = (
        torch.tensor([3.0, 10.0, 0.1], dtype=torch.float64),
        torch.tensor([3.0, 4.0, 9.0], dtype=torch.float64),
    )
    expected = [
        -(2 / beta) * math.log(1 / (1 + math.exp(-beta * (float(a) / float(n) - delta))))
        for a, n in zip(nll, lengths, strict=True)
    ]
    assert simnpo(nll, lengths, beta=beta, delta=delta).tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand_and_the_length_alone_does_not_matter():
    # Mean loss ln 3 per token, beta 1: -2 ln(3 / 4).
    values = simnpo(torch.tensor([math.log(3.0), 7 * math.log(3.0)]), torch.tensor([1.0, 7.0]), beta=1.0)
    assert values.tolist() == pytest.approx([2 * math.log(4 / 3)] * 2, rel=1e-6)
