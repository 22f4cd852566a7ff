"""ramplus_tl against its definition."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, per_element, tensors

from hf_transfer_ext.merging import MERGE_METHODS

ramplus_tl = MERGE_METHODS["ramplus_tl"]


def test_definition():
    base, models = tensors()
    touched = torch.stack([(model.double() - base.double()).abs() > 0.3 for model in models])
    count = touched.sum(0)
    shared = [int((mask & (count > 1)).sum()) for mask in touched]
    unique = [int((mask & (count == 1)).sum()) for mask in touched]
    scales = [1 + 0.5 * min(0.9, s / u) for s, u in zip(shared, unique, strict=True)]

    def oracle(start, *values):
        changes = [(value - start, scale) for value, scale in zip(values, scales, strict=True)]
        kept = [(change, scale) for change, scale in changes if abs(change) > 0.3]
        if len(kept) == 1:
            return start + kept[0][0] * kept[0][1]
        return start + sum(change for change, _ in kept) / max(1, len(kept))

    close(ramplus_tl(base, models, epsilon=0.3, r=0.5, alpha=0.9), per_element(oracle, base, *models))


def test_by_hand():
    base, models = torch.zeros(3), [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])]
    # Model 0: one shared and one unique element, rho = 1, cut to 0.2: factor 1.02.
    assert ramplus_tl(base, models).tolist() == pytest.approx([1.02, 3.0, 0.0])
