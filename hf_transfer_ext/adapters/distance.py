"""How far two stored tensors are apart, without either of them in memory."""

from __future__ import annotations

import math

import torch

from hf_transfer_ext.weights.opened import InputTensor, Scratch

#: Elements that are compared at a time.
PIECE = 1 << 20


def squared_norms(one: InputTensor, other: InputTensor) -> tuple[float, float]:
    """Squared norms of the difference `other - one` and of `one`: both are read a piece at a time."""
    count, scratch = math.prod(one.shape), Scratch()
    difference = norm = 0.0
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        a, b = torch.empty(size), torch.empty(size)
        one.read(start, a, scratch)
        other.read(start, b, scratch)
        difference += float((b - a).double().square().sum())
        norm += float(a.double().square().sum())
    return difference, norm
