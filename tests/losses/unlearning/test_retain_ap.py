import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning.retain_ap import retain_ap


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_it_equals_the_definition(beta):
    torch.manual_seed(0)
    nll, other = torch.rand(5, dtype=torch.float64) * 9, torch.rand(5, dtype=torch.float64) * 9
    ratios = [math.exp(-float(b)) / math.exp(-float(a)) for a, b in zip(nll, other, strict=True)]
    expected = [-(1 / beta) * math.log(1 / (1 + ratio**beta)) for ratio in ratios]
    assert retain_ap(nll, other, beta=beta).tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand():
    # The refusal is a third as likely as the answer: -ln(1 / (1 + 1/3)) = ln(4 / 3).
    value = retain_ap(torch.tensor([0.0]), torch.tensor([math.log(3.0)]), beta=1.0)
    assert value.item() == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_it_prefers_the_answer_and_rests_where_the_refusal_is_unlikely():
    nll = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    retain_ap(nll, torch.tensor([-50.0, 0.0, 900.0]).double()).sum().backward()
    assert nll.grad.tolist() == pytest.approx([1 / (1 + math.exp(-5.0)), 0.5, 0.0], abs=1e-9)


def test_a_temperature_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`beta` must be > 0, got 0"):
        retain_ap(torch.zeros(1), torch.zeros(1), beta=0.0)
