"""sce against its definition."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, per_element, tensors

from hf_transfer_ext.merging import MERGE_METHODS

sce = MERGE_METHODS["sce"]


@pytest.mark.parametrize("select_topk", [1.0, 0.3, 0.05])
def test_definition(select_topk):
    base, models = tensors()
    changes = torch.stack([model.double() - base.double() for model in models])
    variance = changes.var(0, unbiased=False).reshape(-1)
    kept = torch.zeros(60, dtype=torch.float64)
    kept[variance.argsort(descending=True)[: int(60 * select_topk)]] = 1
    changes = changes * kept.reshape(base.shape)
    weights = (changes**2).mean((1, 2))
    weights = (weights / weights.sum()).tolist()

    def merge(start, *numbers):
        sign = 1 if sum(numbers) >= 0 else -1
        agree = [(w, number) for w, number in zip(weights, numbers, strict=True) if number * sign > 0]
        return start + (sum(w * n for w, n in agree) / sum(w for w, _ in agree) if agree else 0.0)

    close(sce(base, models, select_topk=select_topk), per_element(merge, base, *changes))


def test_by_hand():
    base, models = torch.zeros(2), [torch.tensor([3.0, 0.0]), torch.tensor([1.0, -2.0])]
    # Energies 9 and 5: weights 9/14 and 5/14. Signs + and -.
    assert sce(base, models).tolist() == pytest.approx([(27 + 5) / 14, -2.0])
    # Variances 1 and 1 tie, so that one of two keeps both.
    assert sce(base, models, select_topk=0.5).tolist() == pytest.approx([(27 + 5) / 14, -2.0])


def test_small_changes_are_weighed_as_large_ones():
    base, models = tensors()
    small = [base + (model - base) * 2**-12 for model in models]
    change = (sce(base.double().float(), small) - base) * 2**12
    assert torch.allclose(change, sce(base, models) - base, atol=2e-2)


def test_nothing_changed():
    base, _ = tensors()
    assert torch.equal(sce(base, [base, base]), base)
    assert torch.equal(sce(base, [base, base], select_topk=0.5), base)
