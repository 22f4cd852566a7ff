"""iso_c against its definition."""

from __future__ import annotations

import numpy as np
import torch
from merging.method_cases import close, tensors

from hf_transfer_ext.merging import MERGE_METHODS

iso_c = MERGE_METHODS["iso_c"]


def test_definition():
    base, models = tensors()
    total = sum((m - base).double() for m in models).numpy()
    mean = np.sqrt(np.linalg.eigvalsh(total @ total.T)).mean()
    values, vectors = np.linalg.eigh(total @ total.T)
    polar = vectors / np.sqrt(values) @ vectors.T @ total
    close(iso_c(base, models, lambda_=1.3), base.double() + 1.3 * torch.from_numpy(mean * polar), 1e-5)


def test_by_hand():
    base, model = torch.zeros(2, 2), torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    assert torch.allclose(iso_c(base, [model]), torch.tensor([[0.0, 2.0], [2.0, 0.0]]), atol=1e-6)


def test_all_singular_values_are_equal_and_their_sum_stays():
    base, models = tensors()
    before = torch.linalg.svdvals(sum(m - base for m in models))
    after = torch.linalg.svdvals(iso_c(base, models) - base)
    assert torch.allclose(after, before.mean().expand_as(after), atol=1e-5)
