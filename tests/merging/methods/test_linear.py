"""linear against its definition."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, per_element, tensors

from hf_transfer_ext.merging import MERGE_METHODS

linear = MERGE_METHODS["linear"]


@pytest.mark.parametrize("normalize", [True, False])
def test_definition(normalize):
    _, models = tensors()
    divisor = 2.0 if normalize else 1.0
    oracle = per_element(lambda a, b, c: (0.5 * a - 0.25 * b + 1.75 * c) / divisor, *models)
    close(linear(None, models, weight=[0.5, -0.25, 1.75], normalize=normalize), oracle)


def test_by_hand():
    models = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, -2.0])]
    assert linear(None, models, weight=[1, 3]).tolist() == [2.5, -0.5]


def test_weights_that_sum_to_zero_are_refused():
    with pytest.raises(ValueError, match="sum to 0"):
        linear(None, tensors()[1], weight=[1, -1, 0])
