"""ram against its definition."""

from __future__ import annotations

import torch
from merging.method_cases import close, per_element, tensors

from hf_transfer_ext.merging import MERGE_METHODS

ram = MERGE_METHODS["ram"]


def test_definition():
    base, models = tensors()

    def oracle(start, *values):
        changes = [value - start for value in values if abs(value - start) > 0.3]
        return start + sum(changes) / max(1, len(changes))

    close(ram(base, models, epsilon=0.3), per_element(oracle, base, *models))


def test_by_hand():
    base, models = torch.zeros(3), [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])]
    assert ram(base, models).tolist() == [1.0, 3.0, 0.0]
