"""RAM's bookkeeping: which elements one model changed, and which several did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_transfer_ext.merging.changes import Weights, changes_of
from hf_transfer_ext.merging.method import Pieces, gives


def merge_overlap(changes: Sequence[Weights], epsilon: float, scales: Sequence[float]) -> Weights:
    """Sum of the changes above `epsilon`: times s_i where only model i changed, divided by their number elsewhere."""
    touched = [change.abs() > epsilon for change in changes]
    count = torch.stack(touched).sum(0)
    total = torch.zeros_like(changes[0])
    for change, mask, scale in zip(changes, touched, scales, strict=True):
        factor = torch.where(count == 1, torch.full_like(total, scale), 1 / count.clamp(min=1))
        total += change * mask * factor
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
        shared = shared + (touched & (count > 1)).sum(1)
        unique = unique + (touched & (count == 1)).sum(1)
    rho = shared.double() / unique.double().clamp(min=epsilon)
    return {"scales": (1 + r * rho.clamp(0, alpha)).tolist()}
