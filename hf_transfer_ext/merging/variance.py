"""SCE's statistics: where the models vary, and how much each of them changed there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.merging.changes import Weights, changes_of
from hf_transfer_ext.merging.method import Pieces, gives
from hf_transfer_ext.merging.selection import at_least, order_statistics


def variance_of(changes: Sequence[Weights]) -> Weights:
    """Variance over the models (divided by their number), element by element."""
    mean = changes[0].clone()
    for change in changes[1:]:
        mean += change
    mean /= len(changes)
    total = torch.zeros_like(mean)
    for change in changes:
        total += (change - mean).square_()
    return total.div_(len(changes))


def keep_varying(changes: list[Weights], threshold: float) -> list[Weights]:
    """Set to 0 what varies less than the threshold."""
    if threshold <= 0:
        return changes
    kept = at_least(variance_of(changes), threshold).sign_()
    return [change.mul_(kept) for change in changes]


@gives("threshold", "shares")
def energies_and_threshold(pieces: Pieces, *, select_topk: float = 1.0, **options: Any) -> dict[str, Any]:
    """The smallest variance among the kept elements, and each model's share of the squared changes there.

    Of the n elements whose variance is above 0, int(n * select_topk) are kept.
    """
    threshold = 0.0 if select_topk >= 1 else _smallest_kept(pieces, select_topk)
    energies = torch.zeros((), dtype=torch.float64)
    for base, models in pieces:
        if base is None:
            raise ValueError("`sce` needs a base model.")
        kept = keep_varying(changes_of(base, models), threshold)
        energies = energies + torch.stack([torch.dot(one.reshape(-1), one.reshape(-1)).double() for one in kept])
    total = float(energies.sum())
    count = len(energies)
    return {"threshold": threshold, "shares": [float(e) / total if total else 1 / count for e in energies]}


def _smallest_kept(pieces: Pieces, select_topk: float) -> float:
    varying = 0
    for base, models in pieces:
        varying += int(torch.count_nonzero(_variances(base, models)[0]))
    kept = int(varying * select_topk)
    if kept == 0:
        return float("inf")
    return order_statistics(pieces, _variances, [pieces.numel - kept])[0][0]


def _variances(base: Tensor | None, models: list[Tensor]) -> list[Tensor]:
    return [variance_of(changes_of(base, models) if base is not None else models)]
