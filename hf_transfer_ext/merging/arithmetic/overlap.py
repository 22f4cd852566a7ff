"""RAM's bookkeeping: which elements one model changed, and which several did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_transfer_ext.merging.arithmetic.changes import Weights, changes_of
from hf_transfer_ext.merging.method import Pieces, gives


def merge_overlap(changes: Sequence[Weights], epsilon: float, scales: Sequence[float]) -> Weights:
    """Sum of the changes above `epsilon`: times s_i where only model i changed, divided by their number elsewhere."""
    kept = [torch.nn.functional.hardshrink(change, epsilon) for change in changes]
    count = torch.zeros_like(kept[0])
    for one in kept:
        count += one.sign().abs_()
    unique = (2 - count).clamp_(0, 1)  # 1 where one model changed (or none, where all of `kept` is 0)
    total = torch.zeros_like(count)
    for one in kept:
        total += one
    total /= count.clamp_(min=1)
    for one, scale in zip(kept, scales, strict=True):
        if scale != 1:
            total.add_(one.mul_(unique), alpha=scale - 1)
    return total


@gives("scales")
def unique_scales(
    pieces: Pieces, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5, **options: Any
) -> dict[str, Any]:
    """lambda_i = 1 + r min(alpha, shared_i / unique_i); a model without unique elements counts as one with epsilon."""
    shared = unique = torch.zeros((), dtype=torch.int64)
    for base, models in pieces:
        if base is None:
            raise ValueError("`ramplus_tl` needs a base model.")
        touched = torch.stack([change.abs().reshape(-1) > epsilon for change in changes_of(base, models)])
        count = touched.sum(0)
        shared = shared + (touched & (count > 1)).sum(1).cpu()
        unique = unique + (touched & (count == 1)).sum(1).cpu()
    rho = shared.double() / unique.double().clamp(min=epsilon)
    return {"scales": (1 + r * rho.clamp(0, alpha)).tolist()}
