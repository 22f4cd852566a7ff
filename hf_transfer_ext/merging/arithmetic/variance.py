"""SCE's statistics: where the models vary, and how much each of them changed there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.changes import Weights, add_elected_changes, changes_of, in_float
from hf_transfer_ext.merging.arithmetic.selection import Distances, smallest_of_largest
from hf_transfer_ext.merging.method import Pieces, gives


def variance_of(models: Sequence[Weights]) -> Weights:
    """Variance over the models (divided by their number), element by element; that of their changes is the same.

    With y_i the differences from the first model: sum y_i^2 / n - (sum y_i / n)^2. It is exactly 0 where all models
    are equal, and otherwise loses no more digits than n has, since the first model is one of them.
    """
    if kernels.can_take(*models):
        return kernels.variances(models)
    models = [in_float(model) for model in models]
    count = len(models)
    if count == 1:
        return torch.zeros_like(models[0])
    total = models[1] - models[0]
    squares = total * total
    for model in models[2:]:
        other = model - models[0]
        total += other
        squares.addcmul_(other, other)
    return squares.addcmul_(total, total, value=-1 / count).div_(count).clamp_(min=0)


def keep_varying(base: Weights, models: Sequence[Weights], threshold: float) -> list[Weights]:
    """The changes, set to 0 where the variance over the models is less than the threshold."""
    changes = changes_of(base, models)
    if threshold <= 0:
        return changes
    kept = variance_of(models).ge_(threshold)
    return [change.mul_(kept) for change in changes]


def add_varying_changes(
    base: Weights, models: Sequence[Weights], shares: Sequence[float], threshold: float
) -> Weights:
    """The base and, of the changes that vary, the mean of those that agree with the majority, weighted by shares."""
    votes = [1.0] * len(models)
    if kernels.can_take(base, *models):
        return kernels.merge_changes(
            base, models, shares, subtract=True, variance=threshold, votes=votes, normalize=True
        )
    kept = keep_varying(base, models, threshold)
    return add_elected_changes(base, kept, shares, votes=votes, normalize=True, lambda_=1.0)


@gives("threshold", "shares")
def energies_and_threshold(pieces: Pieces, *, select_topk: float = 1.0, **options: Any) -> dict[str, Any]:
    """The smallest variance among the kept elements, and each model's share of the squared changes there.

    Of the n elements whose variance is above 0, int(n * select_topk) are kept.
    """
    threshold = 0.0 if select_topk >= 1 else smallest_of_largest(pieces, _variances, select_topk)
    energies = torch.zeros((), dtype=torch.float64)
    for base, models in pieces:
        if base is None:
            raise ValueError("`sce` needs a base model.")
        if kernels.can_take(base, *models):
            energies = energies + torch.from_numpy(kernels.energies(base, models, threshold))
            continue
        kept = [one.reshape(-1) for one in keep_varying(base, models, threshold)]
        energies = energies + torch.stack([torch.dot(one, one) for one in kept]).double().cpu()
    total = float(energies.sum())
    count = len(energies)
    return {"threshold": threshold, "shares": [float(e) / total if total else 1 / count for e in energies]}


def _variances(base: Tensor | None, models: list[Tensor]) -> list[Distances]:
    return [Distances(variance_of(models))]
