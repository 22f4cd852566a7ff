import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import dmm
from hf_transfer_ext.losses.unlearning.dmm import mean_margins


def test_it_equals_the_definition_by_loops():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets, lengths = [3, 0, 6, 6, 1], [2, 3]
    margins = []
    for row, target in zip(logits.tolist(), targets, strict=True):
        others = sum(math.exp(value) for place, value in enumerate(row) if place != target)
        margins.append(row[target] - math.log(others))
    wanted = [0.5, -1.0]
    expected = [(sum(margins[:2]) / 2 - wanted[0]) ** 2, (sum(margins[2:]) / 3 - wanted[1]) ** 2]
    log_probs = logits.log_softmax(-1)[torch.arange(5), torch.tensor(targets)]
    found = dmm(log_probs, torch.tensor(lengths).double(), torch.tensor(wanted).double())
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand():
    # p = 3/4 is a margin of ln 3; the target is met exactly, so loss and gradient are 0.
    log_probs = torch.tensor([0.75]).double().log().requires_grad_(True)
    loss = dmm(log_probs, torch.tensor([1.0]).double(), torch.tensor([3.0]).double().log())
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-20) and log_probs.grad.item() == pytest.approx(0.0, abs=1e-9)


def test_a_token_that_is_certain_has_a_finite_margin():
    found = mean_margins(torch.tensor([0.0, -200.0]), torch.tensor([1.0, 1.0]))
    assert found.isfinite().all() and found[0] > 15 and found[1].item() == pytest.approx(-200.0)
