import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import ce_u


def test_it_equals_the_definition():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 5, 2, 2])
    expected = []
    for z, y in zip(logits.tolist(), targets.tolist(), strict=True):
        rest = sum(math.exp(z[v]) for v in range(6) if v != y)
        total = sum(map(math.exp, z))
        expected.append(-sum(math.exp(z[v]) / rest * math.log(math.exp(z[v]) / total) for v in range(6) if v != y))
    assert ce_u(logits, targets).tolist() == pytest.approx(expected, rel=1e-10)


def test_by_hand():
    # p = (1/2, 1/4, 1/4), the answer first: the target is (0, 1/2, 1/2).
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    assert ce_u(logits, torch.tensor([0])).item() == pytest.approx(math.log(4.0), rel=1e-6)


def test_the_gradient_is_the_model_minus_the_target():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)).requires_grad_(True)
    ce_u(logits, torch.tensor([0])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.25, -0.25]], dtype=torch.float64))
