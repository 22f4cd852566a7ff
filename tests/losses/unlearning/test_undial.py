import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import undial


def test_it_equals_the_definition():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 4, 6, dtype=torch.float64)
    targets = torch.tensor([0, 5, 2, 2])
    expected = []
    for z, ref, y in zip(logits.tolist(), reference.tolist(), targets.tolist(), strict=True):
        ref[y] -= 3.0
        q = [math.exp(x) / sum(map(math.exp, ref)) for x in ref]
        expected.append(-sum(q[v] * math.log(math.exp(z[v]) / sum(map(math.exp, z))) for v in range(6)))
    assert undial(logits, reference, targets, beta=3.0).tolist() == pytest.approx(expected, rel=1e-10)


def test_by_hand():
    # Reference (ln 4, 0), the answer's logit lowered by ln 4: a half each; the model says (3/4, 1/4).
    logits = torch.tensor([[math.log(3.0), 0.0]])
    reference = torch.tensor([[math.log(4.0), 0.0]])
    value = undial(logits, reference, torch.tensor([0]), beta=math.log(4.0)).item()
    assert value == pytest.approx(-0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4), rel=1e-5)


def test_it_is_at_rest_on_the_adjusted_reference():
    reference = torch.randn(3, 5, dtype=torch.float64)
    targets = torch.tensor([1, 0, 4])
    logits = reference.clone()
    logits[torch.arange(3), targets] -= 10.0
    logits.requires_grad_(True)
    undial(logits, reference, targets).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-12, rtol=0)
