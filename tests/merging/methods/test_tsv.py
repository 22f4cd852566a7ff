"""tsv against its definition."""

from __future__ import annotations

import numpy as np
import torch
from merging.method_cases import close, tensors

from hf_transfer_ext.merging import MERGE_METHODS

tsv = MERGE_METHODS["tsv"]


def orthogonal(matrix):
    """(M M^T)^(-1/2) M, the polar factor, by another way than the singular values of M."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T


def test_definition():
    base, models = tensors(3, (9, 12))
    lefts, values, rights = [], [], []
    for model in models:
        u, s, v = np.linalg.svd((model - base).double().numpy(), full_matrices=False)
        lefts.append(u[:, :3])
        values.append(s[:3])
        rights.append(v[:3].T)
    u, v = orthogonal(np.concatenate(lefts, 1)), orthogonal(np.concatenate(rights, 1))
    oracle = base.double() + 0.7 * torch.from_numpy(u @ np.diag(np.concatenate(values)) @ v.T)
    close(tsv(base, models, lambda_=0.7), oracle, 1e-5)


def test_by_hand():
    base = torch.zeros(2, 2)
    models = [torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    # One direction each: e1 with 3 and e2 with 2, which are orthogonal already.
    assert torch.allclose(tsv(base, models), torch.tensor([[3.0, 0.0], [0.0, 2.0]]), atol=1e-6)


def test_vectors_get_the_mean_change():
    base, models = tensors(2, (5,))
    close(tsv(base, models), base + torch.stack([m - base for m in models]).double().mean(0))
