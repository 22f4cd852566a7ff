from math import exp, log

import pytest
import torch

from hf_transfer_ext.losses.unlearning.whp import whp


def oracle(own, reference, reinforced, strength):
    adjusted = [r - strength * max(0.0, p - r) for r, p in zip(reference, reinforced, strict=True)]
    target = [exp(a) / sum(map(exp, adjusted)) for a in adjusted]
    return -sum(t * log(exp(z) / sum(map(exp, own))) for t, z in zip(target, own, strict=True))


@pytest.mark.parametrize("strength", [0.0, 1.0, 5.0])
def test_it_equals_the_definition(strength):
    torch.manual_seed(0)
    own, reference, reinforced = torch.randn(3, 4, 7, dtype=torch.float64)
    found = whp(own, reference, reinforced, strength=strength)
    rows = zip(own.tolist(), reference.tolist(), reinforced.tolist(), strict=True)
    assert found.tolist() == pytest.approx([oracle(*row, strength) for row in rows], rel=1e-12)


def test_by_hand():
    # The reinforced model raises the first logit by 1, which lowers the reference's 5 to 0: half and half is left.
    value = whp(torch.tensor([[log(3.0), 0.0]]), torch.tensor([[5.0, 0.0]]), torch.tensor([[6.0, -3.0]]))
    assert value.item() == pytest.approx(-0.5 * (log(0.75) + log(0.25)), rel=1e-6)


def test_where_nothing_was_reinforced_the_reference_is_at_rest():
    torch.manual_seed(0)
    reference = torch.randn(4, 7, dtype=torch.float64)
    own = reference.clone().requires_grad_(True)
    whp(own, reference, reference - 1.0).sum().backward()
    assert own.grad.abs().max() < 1e-12


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match="`strength` must be >= 0, got -1"):
        whp(*torch.zeros(3, 1, 2), strength=-1.0)
