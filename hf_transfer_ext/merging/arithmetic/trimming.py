"""Select elements of a change: the largest, those between two ranks, or at random by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer_ext.merging.arithmetic.changes import check_weights
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.arithmetic.selection import Distances, order_statistics
from hf_transfer_ext.merging.method import PerModel, Pieces, for_each, gives
from hf_transfer_ext.weights.devices import on_host

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

    from hf_transfer_ext.merging.types import Values

#: Maximum number of bits of a 32-bit word for the position in a row; the others compare magnitudes.
PLACE_BITS = 13


def magnitudes(base: Values | None, models: Sequence[Values]) -> list[Distances]:
    """|t_i| of one piece, for each model."""
    return [Distances(model, base) for model in models]


@gives("thresholds")
def smallest_kept(
    pieces: Pieces, *, density: PerModel = 1.0, thresholds: Sequence[float] | None = None, **options: Any
) -> dict[str, Any]:
    """Per model, the smallest magnitude among the largest int(density * numel) elements; inf if there are none.

    Args:
        thresholds: Thresholds for the whole model, if known (`whole_model`); they are then used for each tensor.
    """
    if thresholds is not None:
        return {"thresholds": list(thresholds)}
    lows = [low for low, _ in kept_magnitudes(pieces, density, 0.0)]
    return {"thresholds": lows}


@gives("bounds")
def inner_magnitudes(
    pieces: Pieces, *, density: PerModel = 1.0, gamma: PerModel = 0.01, **options: Any
) -> dict[str, Any]:
    """Per model, the smallest and largest magnitude to keep after dropping the share `gamma` of outliers."""
    return {"bounds": kept_magnitudes(pieces, density, gamma)}


def kept_magnitudes(pieces: Pieces, density: PerModel, gamma: PerModel) -> list[tuple[float, float]]:
    """Bounds (low, high) of the kept magnitudes, per model: both are magnitudes of kept elements.

    Of n elements, the int(gamma n) largest are dropped, then the smallest, until int(density n) are left. If that is
    not possible (density + gamma > 1), fewer of the largest are dropped. Density 1 keeps everything.
    """
    ranks: list[tuple[int, int] | None] = []
    for share, outliers in zip(for_each(density, pieces.count), for_each(gamma, pieces.count), strict=True):
        kept = int(share * pieces.numel)
        top = min(int(outliers * pieces.numel), pieces.numel - kept)
        last = pieces.numel - 1 - top
        ranks.append((last - kept + 1, last) if kept else None)
    everything = (0, pieces.numel - 1)
    wanted = sorted({rank for pair in ranks if pair not in (None, everything) for rank in pair or ()})
    # One selection for all models: they share the pieces, and models with equal options share the ranks.
    values = order_statistics(pieces, magnitudes, wanted) if wanted else []
    bounds = []
    for i, pair in enumerate(ranks):
        if pair is None:
            bounds.append((float("inf"), float("inf")))
        elif pair == everything:
            bounds.append((0.0, float("inf")))
        else:
            low, high = (values[i][wanted.index(rank)] for rank in pair)
            bounds.append((low, high if pair[1] < pieces.numel - 1 else float("inf")))
    return bounds


def drop_by_rank(
    change: Float[Tensor, "rows columns"],
    density: float,
    epsilon: float,
    *,
    rescale: bool,
    noise: Noise,
    model: int,
) -> Float[Tensor, "rows columns"]:
    """Keep each element of a change with a probability that grows with the rank of its magnitude in the row.

    The smallest of a row is kept with probability density - epsilon, the largest with density + epsilon, and those
    between linearly by rank. With `rescale`, each is divided by its own probability.

    Magnitudes are compared only by as many leading bits as fit into a 32-bit word with the position (at least 11 bits
    of the mantissa for rows of up to 4096), and equal ones are ranked by position. Sorting such words takes a third of
    the time of an argsort.

    Args:
        model: Index of the model, which selects its random numbers.
    """
    import torch

    if density >= 1 or density <= 0:
        return change * float(density >= 1)
    rows, columns = change.shape
    limits, scales = limits_and_scales(density, epsilon, columns, rescale)
    # Random words are indexed by rank, not by position: they are independent, so the assignment does not matter.
    magnitudes = change.detach().float().contiguous()
    if on_host(change):
        order = torch.from_numpy(_order_of_magnitudes(magnitudes))
        kept = noise.words(model, rows * columns).reshape(rows, columns) < limits
        factors = torch.from_numpy(kept * scales)
    else:
        order = _order_on_device(magnitudes)
        words = noise.words_on(change.device, model, rows * columns).reshape(rows, columns)
        chosen = words < torch.from_numpy(limits.astype(np.int64)).to(change.device)
        factors = chosen * torch.from_numpy(scales).to(change.device)
    return change * torch.empty_like(factors).scatter_(1, order, factors)


def limits_and_scales(density: float, epsilon: float, columns: int, rescale: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each rank in a row, the uint32 below which a random word keeps an element, and its float32 factor."""
    steps = np.linspace(density - epsilon, density + epsilon, columns) if columns > 1 else np.array([density])
    limits = (steps * 2.0**32).astype(np.uint32)
    return limits, (1 / steps if rescale else np.ones(columns)).astype(np.float32)


def _order_of_magnitudes(change: Float[Tensor, "rows columns"]) -> np.ndarray:
    """The positions of each row's elements, from the smallest magnitude to the largest."""
    columns = change.shape[1]
    width = bits_of_places(columns)
    places = np.arange(columns, dtype=np.uint32)
    bits = change.numpy().view(np.uint32) << np.uint32(1)  # without the sign
    if width <= PLACE_BITS:
        mask = np.uint32((1 << width) - 1)
        bits &= ~mask
        bits |= places
        bits.sort(axis=1)
        bits &= mask
        return bits.astype(np.int64)
    long = (bits.astype(np.uint64) << np.uint64(32)) | places
    long.sort(axis=1)
    return (long & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _order_on_device(change: Float[Tensor, "rows columns"]) -> Int64[Tensor, "rows columns"]:
    """The same order, from 64-bit words."""
    import torch

    columns = change.shape[1]
    width = bits_of_places(columns)
    places = torch.arange(columns, device=change.device)
    magnitudes = change.contiguous().view(torch.int32).long() & 0x7FFFFFFF
    mask = (1 << (width if width <= PLACE_BITS else 32)) - 1
    words = (magnitudes << 1) & ~mask if width <= PLACE_BITS else magnitudes << 32
    return (words | places).sort(dim=1).values & mask


def bits_of_places(columns: int) -> int:
    """Number of bits for the positions in a row."""
    return max(1, (columns - 1).bit_length())


def check_della(*, density: PerModel = 1.0, epsilon: PerModel = 0.15, **options: Any) -> None:
    """Probabilities must be in (0, 1), and the sum of the weights must not be 0 if it is a divisor."""
    check_weights(**options)
    densities = [density] if isinstance(density, (int, float)) else list(density)
    epsilons = [epsilon] if isinstance(epsilon, (int, float)) else list(epsilon)
    if len(epsilons) == 1:
        epsilons *= len(densities)
    for share, spread in zip(densities, epsilons, strict=False):
        if 0 < share < 1 and not (share - spread > 0 and share + spread < 1):
            raise ValueError(
                f"`density` - `epsilon` and `density` + `epsilon` must be between 0 and 1, got {share} and "
                f"{spread}. Choose a smaller epsilon."
            )
