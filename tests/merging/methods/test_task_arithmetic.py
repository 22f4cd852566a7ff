"""task_arithmetic against its definition."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, per_element, tensors

from hf_transfer_ext.merging import MERGE_METHODS

task_arithmetic = MERGE_METHODS["task_arithmetic"]


@pytest.mark.parametrize("normalize", [True, False])
def test_definition(normalize):
    base, models = tensors()
    scale = 0.8 / (1.5 if normalize else 1.0)

    def oracle(start, a, b, c):
        return start + scale * (0.5 * (a - start) + 0.3 * (b - start) + 0.7 * (c - start))

    options = {"weight": [0.5, 0.3, 0.7], "normalize": normalize, "lambda_": 0.8}
    close(task_arithmetic(base, models, **options), per_element(oracle, base, *models))


def test_by_hand():
    base, models = torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([5.0])]
    assert task_arithmetic(base, models, weight=[1, -0.5], lambda_=2).tolist() == [1 + 2 * (1 - 2)]


def test_negation_takes_back_what_was_added():
    base, models = tensors(1)
    there = task_arithmetic(base, models, weight=1)
    change = there - base
    close(task_arithmetic(base, [base + change], weight=-1), (base - change).double())


def test_weights_that_cancel_are_refused_and_zeros_give_the_base():
    base, models = tensors(2)
    with pytest.raises(ValueError, match="sum to 0"):
        task_arithmetic(base, models, weight=[1, -1], normalize=True)
    assert torch.equal(task_arithmetic(base, models, weight=0, normalize=True), base)
