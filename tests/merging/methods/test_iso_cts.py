"""iso_cts against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merging.method_cases import close, tensors

from hf_transfer_ext.merging import MERGE_METHODS

iso_cts = MERGE_METHODS["iso_cts"]


def orthogonal(matrix):
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize(("fraction", "own"), [(0.4, 2), (0.7, 1), (1.0, 0)])
def test_definition(fraction, own):
    base, models = tensors(3, (10, 12))
    changes = [(m - base).double().numpy() for m in models]
    u, s, v = np.linalg.svd(sum(changes), full_matrices=False)
    common = 10 - 3 * own
    lefts, values, rights = [], [], []
    for change in changes:
        a, b, c = np.linalg.svd(change - u[:, :common] @ u[:, :common].T @ change, full_matrices=False)
        lefts.append(a[:, :own])
        values.append(b[:own])
        rights.append(c[:own].T)
    left = orthogonal(np.concatenate([*lefts, u[:, :common]], 1))
    right = orthogonal(np.concatenate([*rights, v[:common].T], 1))
    mean = np.concatenate([*values, s[:common]]).mean()
    oracle = base.double() + 0.7 * torch.from_numpy(mean * left @ right.T)
    close(iso_cts(base, models, common_space_fraction=fraction, lambda_=0.7), oracle, 1e-5)


def test_without_own_directions_it_is_iso_c():
    base, models = tensors()
    iso_c = MERGE_METHODS["iso_c"](base, models)
    assert torch.allclose(iso_cts(base, models, common_space_fraction=1.0), iso_c, atol=1e-5)


def test_by_hand():
    base = torch.zeros(2, 2)
    models = [torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])]
    # The sum has one direction with strength 6; the other singular value is 0, and the mean 3.
    merged = iso_cts(base, models, common_space_fraction=1.0)
    assert float(merged[0, 0]) == pytest.approx(3.0) and float(merged[0, 1]) == pytest.approx(0.0, abs=1e-6)
