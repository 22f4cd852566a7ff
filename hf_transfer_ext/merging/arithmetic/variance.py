"""Statistics of SCE: where the models vary, and how much each of them changed there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.changes import changes_of
from hf_transfer_ext.merging.arithmetic.selection import Distances, smallest_of_largest
from hf_transfer_ext.merging.method import Pieces, gives, in_float

if TYPE_CHECKING:
    from hf_transfer_ext.merging.types import Values


def variance_of(models: Sequence[Values]) -> Any:
    """Elementwise variance over the models (divided by their number), which is also the variance of their changes.

    With y_i the differences from the first model: sum y_i^2 / n - (sum y_i / n)^2. It is exactly 0 where all models
    are equal, and otherwise loses at most as many digits as n has, since the first model is one of them.
    """
    if kernels.can_take(*models):
        return kernels.variances(models)
    import torch

    first, *others = [in_float(model).detach() for model in models]
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for other in others:
        difference = other - first
        total += difference
        squares.addcmul_(difference, difference)
    return squares.addcmul_(total, total, value=-1 / len(models)).div_(len(models)).clamp_(min=0)


@gives("threshold", "shares")
def energies_and_threshold(pieces: Pieces, *, select_topk: float = 1.0, **options: Any) -> dict[str, Any]:
    """The smallest variance of the kept elements, and each model's share of the squared changes there.

    Of the n elements whose variance is above 0, int(n * select_topk) are kept. The shares sum to 1.
    """
    threshold = 0.0 if select_topk >= 1 else smallest_of_largest(pieces, _variances, select_topk)
    energies: Any = 0.0
    for base, models in pieces:
        if base is None:
            raise ValueError("`sce` needs a base model.")
        if kernels.can_take(base, *models):
            energies = energies + kernels.energies(base, models, threshold)
            continue
        import torch

        kept = variance_of(models) >= threshold
        of_piece = torch.stack([((t * kept) ** 2).sum() for t in changes_of(base, models)])
        energies = energies + of_piece.double().cpu()
    total = energies.sum()
    shares = energies / total if total else [1 / len(energies)] * len(energies)
    return {"threshold": threshold, "shares": shares.tolist() if isinstance(shares, np.ndarray) else list(shares)}


def _variances(base: Values | None, models: Sequence[Values]) -> list[Distances]:
    return [Distances(variance_of(models))]
