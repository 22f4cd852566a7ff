"""knots against its definition."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, elected, tensors, trimmed

from hf_transfer_ext.merging import MERGE_METHODS

knots = MERGE_METHODS["knots"]


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_definition(density):
    base, models = tensors()
    changes = torch.cat([(m - base).double() for m in models], dim=1)
    u, s, v = torch.linalg.svd(changes, full_matrices=False)
    parts = (s[:, None] * v).split(10, dim=1)
    kept = [trimmed(part, int(density * part.numel())) for part in parts]
    merged = elected(torch.zeros(6, 10), kept, [0.5, 0.3, 0.7], True, 0.8)
    oracle = base.double() + u @ merged
    close(knots(base, models, weight=[0.5, 0.3, 0.7], density=density, lambda_=0.8), oracle, 1e-5)


def test_by_hand():
    base = torch.zeros(1, 2)
    models = [torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 2.0]])]
    # One row: the basis is +-1, and TIES sees the changes themselves.
    assert torch.allclose(knots(base, models, weight=1), torch.tensor([[2.0, 2.0]]), atol=1e-6)
