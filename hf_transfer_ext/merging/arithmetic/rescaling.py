"""Rescale trimmed changes to their original L1 norm: mergekit's `rescale` for methods that trim by magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.merging.arithmetic.changes import changes_of
from hf_transfer_ext.merging.arithmetic.selection import keep_magnitudes
from hf_transfer_ext.merging.arithmetic.trimming import inner_magnitudes, smallest_kept
from hf_transfer_ext.merging.method import PerModel, Pieces, for_each, gives

if TYPE_CHECKING:
    from torch import Tensor

#: A change with a smaller sum of magnitudes is not rescaled.
SMALLEST_SUM = 1e-7


@gives("thresholds", "scales")
def smallest_kept_and_scales(
    pieces: Pieces, *, density: PerModel = 1.0, rescale: bool = False, **options: Any
) -> dict[str, Any]:
    """`smallest_kept`, and, with `rescale`, the factors of the kept changes.

    A density above 0 keeps at least the largest element of each tensor, as in mergekit.
    """
    shares = [
        max(share, 1.5 / max(1, pieces.numel)) if share > 0 else 0.0 for share in for_each(density, pieces.count)
    ]
    found = smallest_kept(pieces, density=shares, **options)
    bounds = [(low, float("inf")) for low in found["thresholds"]]
    return {**found, "scales": _scales(pieces, bounds) if rescale else [1.0] * len(bounds)}


@gives("bounds", "scales")
def inner_magnitudes_and_scales(
    pieces: Pieces, *, density: PerModel = 1.0, gamma: PerModel = 0.01, rescale: bool = False, **options: Any
) -> dict[str, Any]:
    """`inner_magnitudes`, and, with `rescale`, the factors of the kept changes."""
    found = inner_magnitudes(pieces, density=density, gamma=gamma, **options)
    bounds = found["bounds"]
    return {**found, "scales": _scales(pieces, bounds) if rescale else [1.0] * len(bounds)}


def _scales(pieces: Pieces, bounds: Sequence[tuple[float, float]]) -> list[Tensor]:
    """Sum of |t_i| divided by the sum of kept |t_i|, for each model; 1 if either is (nearly) 0."""
    import torch

    sums = torch.zeros(len(bounds), 2, dtype=torch.float64)
    for base, models in pieces:
        if base is None:
            raise ValueError("`rescale` needs a base model.")
        of_piece = [
            torch.stack([change.abs().sum(), keep_magnitudes(change, *pair).abs().sum()])
            for change, pair in zip(changes_of(base, models), bounds, strict=True)
        ]
        sums = sums + torch.stack(of_piece).double().cpu()
    return [
        before / after if min(before, after) >= SMALLEST_SUM else torch.ones_like(before) for before, after in sums
    ]
