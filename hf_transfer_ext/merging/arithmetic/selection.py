"""Exact order statistics of a tensor that is read in pieces: which value has rank k?

A sample brackets the value; one pass counts the values outside the bracket and collects those inside, and a selection
among the collected values gives the answer. If the value is outside the bracket (a sample can be misleading), two
passes of histograms over the bits of the numbers find it. Both ways are exact, and neither sorts the tensor or holds
all of it in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.method import Pieces, in_float
from hf_transfer_ext.weights.devices import on_host

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from torch import Tensor

    from hf_transfer_ext.merging.types import Values


@dataclass(frozen=True)
class Distances:
    """|one - other| as scores, or |one|: the kernels count them without storing them."""

    one: Any
    other: Any = None

    def values(self) -> Values:
        if isinstance(self.one, np.ndarray):
            one = kernels.in_float32(self.one)
            return np.abs(one if self.other is None else one - kernels.in_float32(self.other))
        if self.other is None:
            return in_float(self.one.detach()).abs()
        return (in_float(self.one.detach()) - in_float(self.other.detach())).abs_()


if TYPE_CHECKING:
    Series: TypeAlias = Tensor | Distances

    #: Maps one piece to the numbers of each series; a series is, for example, the magnitudes of one model's change.
    Scores: TypeAlias = Callable[[Any, list[Any]], Sequence[Series]]


def order_statistics(pieces: Pieces, scores: Scores, ranks: Sequence[int]) -> list[list[float]]:
    """The values at given ranks in each series of scores.

    Args:
        scores: Returns, for one piece, one tensor per series (float32, with as many elements as the piece), or what it
            is computed from.
        ranks: Ranks from the smallest, 0 .. numel - 1.

    Returns:
        One list per series, with one value per rank.
    """
    if not ranks:
        return []
    bad = [rank for rank in ranks if not 0 <= rank < pieces.numel]
    if bad:
        raise ValueError(f"Ranks must be from 0 to {pieces.numel - 1}, got {bad[0]}.")
    sample = _sample(pieces, scores)
    if len(sample[0]) == pieces.numel:
        return [values_at(one, ranks) for one in sample]
    brackets = [[Bracket.around(one, rank / max(1, pieces.numel - 1)) for rank in ranks] for one in sample]
    for base, models in pieces:
        _count(brackets, scores(base, models))
    found = []
    for i, row in enumerate(brackets):
        values = [bracket.value(rank) for bracket, rank in zip(row, ranks, strict=True)]
        inside = [value for value in values if value is not None]
        found.append(inside if len(inside) == len(ranks) else _by_histograms(pieces, scores, i, ranks))
    return found


def smallest_of_largest(pieces: Pieces, scores: Scores, share: float) -> float:
    """The smallest of the largest int(share * n) of the n scores above 0; inf if there are none.

    Args:
        scores: Returns, for one piece, one series of numbers >= 0.
    """
    (sample,) = _sample(pieces, scores)
    some = int(np.count_nonzero(sample > 0))
    if len(sample) == pieces.numel:
        kept = int(some * share)
        return values_at(sample, [len(sample) - kept])[0] if kept else float("inf")
    # The sample gives an approximate bracket; the number of scores above 0 is counted in the same pass.
    bracket = Bracket.around(sample, 1 - some * share / len(sample))
    above_zero = 0
    for base, models in pieces:
        above_zero += _count([[bracket]], scores(base, models))[0]
    kept = int(above_zero * share)
    if not kept:
        return float("inf")
    value = bracket.value(pieces.numel - kept)
    return _by_histograms(pieces, scores, 0, [pieces.numel - kept])[0] if value is None else value


@dataclass
class Bracket:
    """Counts of the numbers around two edges, between which the value at a rank is expected.

    The numbers in sorted order, with the three counts from the left; those equal to an edge are counted but not
    collected, since often a tenth of all changes are exactly 0::

        x x x x x x | low low low | i i i i i i i i | high high | x x x x
        -- below -->|             |   `inside`      |           |
        -------- up_to_low ------>|                 |           |
        ------------------- up_to_high ------------------------>|
    """

    low: np.float32
    high: np.float32
    below: int = 0
    up_to_low: int = 0
    up_to_high: int = 0
    inside: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def around(cls, sample: np.ndarray, place: float) -> Bracket:
        """The bracket of the value at a relative position (0: smallest, 1: largest), from a sample.

        The margin is 8 standard deviations of a sample of independent elements, since neighbors in a tensor are alike.
        """
        size = len(sample)
        margin = 8 * (size * place * (1 - place)) ** 0.5 + 16
        low, high = int(place * (size - 1) - margin), int(place * (size - 1) + margin) + 1
        edges = values_at(sample, [max(low, 0), min(high, size - 1)])
        return cls(np.float32(edges[0] if low >= 0 else -np.inf), np.float32(edges[1] if high < size else np.inf))

    def add(self, below: int, up_to_low: int, up_to_high: int, inside: np.ndarray) -> None:
        """Add the counts of one piece."""
        self.below += below
        self.up_to_low += up_to_low
        self.up_to_high += up_to_high
        self.inside.append(inside)

    def value(self, rank: int) -> float | None:
        """The value at the rank, or None if it is outside the bracket."""
        if self.below <= rank < self.up_to_low:
            return float(self.low)
        inside = np.concatenate(self.inside) if self.inside else np.empty(0, dtype=np.float32)
        self.inside = []
        place = rank - self.up_to_low
        if 0 <= place < len(inside):
            return values_at(inside, [place])[0]
        return float(self.high) if 0 <= place and rank < self.up_to_high else None


def values_at(numbers: np.ndarray, places: Sequence[int]) -> list[float]:
    """The numbers at some positions of the sorted sequence; the kernels find them without sorting everything."""
    if numbers.dtype == np.float32 and kernels.can_take():
        return kernels.values_at(numbers, places)
    return np.sort(numbers)[list(places)].tolist()


def _count(brackets: Sequence[Sequence[Bracket]], series: Sequence[Series]) -> list[int]:
    """Add one piece to the brackets of each series; returns the count of numbers above 0 in each series."""
    if _is_for_kernels(series):
        return _count_by_kernels(brackets, [one for one in series if isinstance(one, Distances)])
    positive = []
    for row, one in zip(brackets, series, strict=True):
        values = _values(one)
        for bracket in row:
            if isinstance(values, np.ndarray):
                _count_on_host(bracket, values)
            else:
                _count_on_device(bracket, values)
        positive.append(int((values > 0).sum()))
    return positive


def _is_for_kernels(series: Sequence[Series]) -> bool:
    """Whether all series are distances from one tensor, of a type that the kernels support."""
    distances = [one for one in series if isinstance(one, Distances)]
    if len(distances) < len(series) or len({id(one.other) for one in distances}) > 1:
        return False
    return kernels.can_take(distances[0].other, *(one.one for one in distances))


def _count_by_kernels(brackets: Sequence[Sequence[Bracket]], series: Sequence[Distances]) -> list[int]:
    edges = np.array([[[one.low for one in row] for row in brackets], [[one.high for one in row] for row in brackets]])
    found = kernels.take_magnitudes([one.one for one in series], series[0].other, edges)
    numel = math.prod(series[0].one.shape)
    for row, taken in zip(brackets, found, strict=True):
        for bracket, (below, above_low, above_high), inside in zip(row, taken.counts, taken.inside, strict=True):
            bracket.add(int(below), numel - int(above_low), numel - int(above_high), inside)
    return [taken.positive for taken in found]


def _count_on_host(bracket: Bracket, numbers: np.ndarray) -> None:
    below, above_low = np.count_nonzero(numbers < bracket.low), numbers > bracket.low
    up_to_low = len(numbers) - int(np.count_nonzero(above_low))
    up_to_high = len(numbers) - int(np.count_nonzero(numbers > bracket.high))
    above_low &= numbers < bracket.high
    bracket.add(int(below), up_to_low, up_to_high, numbers[np.flatnonzero(above_low)])


def _count_on_device(bracket: Bracket, values: Tensor) -> None:
    import torch

    low, high = float(bracket.low), float(bracket.high)
    above_low = values > low
    below, up_to_low, up_to_high = torch.stack(
        [(values < low).sum(), (~above_low).sum(), (~(values > high)).sum()]
    ).tolist()
    bracket.add(below, up_to_low, up_to_high, values[above_low & (values < high)].cpu().numpy())


def _values(series: Series) -> Values:
    """The numbers of a series in one dimension: an array if they are in the memory of the host."""
    values = (series.values() if isinstance(series, Distances) else series.detach()).reshape(-1)
    return values.numpy() if not isinstance(values, np.ndarray) and on_host(values) else values


def as_array(series: Series) -> np.ndarray:
    """The numbers of a series in one dimension, in the memory of the host."""
    values = _values(series)
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def _sample(pieces: Pieces, scores: Scores) -> list[np.ndarray]:
    """The sample of each series."""
    collected = [[as_array(one).copy() for one in scores(base, models)] for base, models in pieces.sample()]
    return [np.concatenate(one) for one in zip(*collected, strict=True)]


def _by_histograms(pieces: Pieces, scores: Scores, series: int, ranks: Sequence[int]) -> list[float]:
    """Find the upper 16 bits of each value by a histogram, then the lower 16 among the numbers that share them."""
    upper = np.zeros(1 << 16, dtype=np.int64)
    for base, models in pieces:
        upper += np.bincount(_sortable(as_array(scores(base, models)[series])) >> 16, minlength=1 << 16)
    ends = np.cumsum(upper)
    buckets = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    lower = {bucket: np.zeros(1 << 16, dtype=np.int64) for bucket in buckets}
    for base, models in pieces:
        words = _sortable(as_array(scores(base, models)[series]))
        for bucket, histogram in lower.items():
            histogram += np.bincount(words[words >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    values = []
    for rank, bucket in zip(ranks, buckets, strict=True):
        place = rank - int(ends[bucket] - upper[bucket])
        low = int(np.searchsorted(np.cumsum(lower[bucket]), place, side="right"))
        values.append(_from_sortable(bucket << 16 | low))
    return values


def _sortable(values: np.ndarray) -> np.ndarray:
    """Order-preserving float32 -> uint32: the bits of positive numbers grow with them, those of negative ones fall."""
    bits = (values + np.float32(0)).view(np.uint32)  # turns -0 into 0
    return bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31))


def _from_sortable(word: int) -> float:
    bits = word & 0x7FFFFFFF if word >> 31 else ~word & 0xFFFFFFFF
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def keep_magnitudes(change: Tensor, low: float, high: float = float("inf")) -> Tensor:
    """x where low <= |x| <= high, and 0 elsewhere.

    Uses `hardshrink`, which keeps |x| > its argument: on CPUs, selecting by a mask in torch is thirty times slower.
    """
    from torch.nn.functional import hardshrink

    if high < float("inf"):
        change = change - hardshrink(change, high)
    if low <= 0:
        return change
    return hardshrink(change, _next_below(low, change.dtype) if np.isfinite(low) else low)


def _next_below(number: float, dtype: torch.dtype) -> float:
    """The largest number of the dtype that is smaller."""
    kind = np.float64 if str(dtype) == "torch.float64" else np.float32
    return float(np.nextafter(kind(number), kind(0)))
