"""Exact order statistics of a tensor that is only seen in pieces: what value has rank k?

A sample brackets the value; one pass counts what lies outside the bracket and collects what lies inside, and a
partition of the inside gives the answer. Should the value lie outside (a sample can mislead), two passes of histograms
over the bits of the numbers give it. Both ways are exact, and neither sorts or keeps the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.changes import in_float
from hf_transfer_ext.merging.method import Pieces
from hf_transfer_ext.weights.devices import on_host


@dataclass(frozen=True)
class Distances:
    """|one - other| as scores, or |one|: kernels count them without writing them down."""

    one: Tensor
    other: Tensor | None = None

    def values(self) -> Tensor:
        if self.other is None:
            return in_float(self.one).abs()
        return (in_float(self.one) - in_float(self.other)).abs_()


Series: TypeAlias = Tensor | Distances

#: From one piece to the numbers of each series; a series is, for example, the magnitudes of one model's change.
Scores: TypeAlias = Callable[[Tensor | None, list[Tensor]], Sequence[Series]]


def order_statistics(pieces: Pieces, scores: Scores, ranks: Sequence[int]) -> list[list[float]]:
    """The values of given ranks in each series of scores.

    Args:
        scores: Gives for one piece one tensor (float32, as many elements as the piece), or what it is calculated from,
            for each series.
        ranks: Counted from the smallest, 0 .. numel - 1.

    Returns:
        One list for each series, with one value for each rank.
    """
    if not ranks:
        return []
    bad = [rank for rank in ranks if not 0 <= rank < pieces.numel]
    if bad:
        raise ValueError(f"Ranks go from 0 to {pieces.numel - 1}, got {bad[0]}.")
    sample = _sample(pieces, scores)
    if len(sample[0]) == pieces.numel:
        return [values_at(one, ranks) for one in sample]
    brackets = [[_Bracket(one, rank / max(1, pieces.numel - 1)) for rank in ranks] for one in sample]
    for base, models in pieces:
        _take(brackets, scores(base, models))
    found = []
    for i, row in enumerate(brackets):
        values = [bracket.value(rank) for bracket, rank in zip(row, ranks, strict=True)]
        inside = [value for value in values if value is not None]
        found.append(inside if len(inside) == len(ranks) else _by_histograms(pieces, scores, i, ranks))
    return found


def smallest_of_largest(pieces: Pieces, scores: Scores, share: float) -> float:
    """The smallest among the largest int(share * n) of the n scores above 0; inf if these are none.

    Args:
        scores: Gives for one piece one series of numbers that are at least 0.
    """
    (sample,) = _sample(pieces, scores)
    some = int(np.count_nonzero(sample > 0))
    if len(sample) == pieces.numel:
        kept = int(some * share)
        return values_at(sample, [len(sample) - kept])[0] if kept else float("inf")
    # The sample tells about where to look; how many scores are above 0 is counted in the same pass.
    bracket = _Bracket(sample, 1 - some * share / len(sample))
    above_zero = 0
    for base, models in pieces:
        above_zero += _take([[bracket]], scores(base, models))[0]
    kept = int(above_zero * share)
    if not kept:
        return float("inf")
    value = bracket.value(pieces.numel - kept)
    return _by_histograms(pieces, scores, 0, [pieces.numel - kept])[0] if value is None else value


class _Bracket:
    """Two values of a sample between which the value at a place (0: the least, 1: the largest) is expected.

    The margin is 8 standard deviations of a sample of independent elements, since neighbours in a tensor are alike.
    """

    def __init__(self, sample: np.ndarray, place: float) -> None:
        size = len(sample)
        margin = 8 * (size * place * (1 - place)) ** 0.5 + 16
        low, high = int(place * (size - 1) - margin), int(place * (size - 1) + margin) + 1
        edges = values_at(sample, [max(low, 0), min(high, size - 1)])
        self.low = np.float32(edges[0] if low >= 0 else -np.inf)
        self.high = np.float32(edges[1] if high < size else np.inf)
        self.below = self.up_to_low = self.up_to_high = 0
        self.inside: list[np.ndarray] = []

    def add(self, below: int, up_to_low: int, up_to_high: int, inside: np.ndarray) -> None:
        """Add what was counted in one piece; the edges are counted and not collected."""
        self.below, self.up_to_low = self.below + below, self.up_to_low + up_to_low
        if self.low < self.high < np.inf:
            self.up_to_high += up_to_high
        self.inside.append(inside)

    def take(self, values: Tensor) -> None:
        """Count one piece. The edges are counted and not collected: often a tenth of all changes are exactly 0."""
        if not on_host(values):
            self._take_on_device(values)
            return
        numbers = values.numpy()
        if self.low > -np.inf:
            self.below += int(np.count_nonzero(numbers < self.low))
        above_low = numbers > self.low
        self.up_to_low += len(numbers) - int(np.count_nonzero(above_low))
        if self.high == self.low:
            return
        if self.high < np.inf:
            self.up_to_high += len(numbers) - int(np.count_nonzero(numbers > self.high))
        above_low &= numbers < self.high
        self.inside.append(numbers[np.flatnonzero(above_low)])

    def _take_on_device(self, values: Tensor) -> None:
        low, high = float(self.low), float(self.high)
        above_low = values > low
        counts = torch.stack([(values < low).sum(), (~above_low).sum(), (values <= high).sum()]).tolist()
        self.below, self.up_to_low = self.below + counts[0], self.up_to_low + counts[1]
        self.up_to_high += counts[2]
        if high > low:
            self.inside.append(values[above_low & (values < high)].cpu().numpy())

    def value(self, rank: int) -> float | None:
        """The value of the rank, or None if it lies outside."""
        inside = np.concatenate(self.inside) if self.inside else np.empty(0, dtype=np.float32)
        self.inside = []
        if self.below <= rank < self.up_to_low:
            return float(self.low)
        place = rank - self.up_to_low
        if 0 <= place < len(inside):
            return values_at(inside, [place])[0]
        return float(self.high) if 0 <= place and rank < self.up_to_high else None


def values_at(numbers: np.ndarray, places: Sequence[int]) -> list[float]:
    """The numbers (float32) that stand at some places when they are sorted; without sorting all where kernels are."""
    return kernels.values_at(numbers, places) if kernels.can_take() else np.sort(numbers)[list(places)].tolist()


def _take(brackets: Sequence[Sequence[_Bracket]], series: Sequence[Series]) -> list[int]:
    """Let the brackets of each series count one piece; returns how many numbers of each are above 0."""
    distances = [one for one in series if isinstance(one, Distances)]
    alike = len(distances) == len(series) and len({id(one.other) for one in distances}) == 1
    if alike and kernels.can_take(distances[0].other, *(one.one for one in distances)):
        edges = np.array(
            [[[one.low for one in row] for row in brackets], [[one.high for one in row] for row in brackets]]
        )
        found = kernels.take_magnitudes([one.one for one in distances], distances[0].other, edges)
        numel = distances[0].one.numel()
        for row, taken in zip(brackets, found, strict=True):
            for bracket, (below, above_low, above_high), inside in zip(row, taken.counts, taken.inside, strict=True):
                bracket.add(int(below), numel - int(above_low), numel - int(above_high), inside)
        return [taken.positive for taken in found]
    positive = []
    for row, one in zip(brackets, series, strict=True):
        values = _values(one)
        for bracket in row:
            bracket.take(values)
        positive.append(int(np.count_nonzero(values.numpy() > 0)) if on_host(values) else int((values > 0).sum()))
    return positive


def _values(series: Series) -> Tensor:
    return (series.values() if isinstance(series, Distances) else series).reshape(-1)


def _sample(pieces: Pieces, scores: Scores) -> list[np.ndarray]:
    """The sample of each series."""
    collected = [[_values(one).cpu().clone() for one in scores(base, models)] for base, models in pieces.sample()]
    return [torch.cat(one).numpy() for one in zip(*collected, strict=True)]


def _by_histograms(pieces: Pieces, scores: Scores, series: int, ranks: Sequence[int]) -> list[float]:
    """Find the upper 16 bits of each value by a histogram, then the lower 16 among the numbers that share them."""
    upper = np.zeros(1 << 16, dtype=np.int64)
    for base, models in pieces:
        upper += np.bincount(_sortable(_values(scores(base, models)[series]).cpu().numpy()) >> 16, minlength=1 << 16)
    ends = np.cumsum(upper)
    buckets = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    lower = {bucket: np.zeros(1 << 16, dtype=np.int64) for bucket in buckets}
    for base, models in pieces:
        words = _sortable(_values(scores(base, models)[series]).cpu().numpy())
        for bucket, histogram in lower.items():
            histogram += np.bincount(words[words >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    values = []
    for rank, bucket in zip(ranks, buckets, strict=True):
        place = rank - int(ends[bucket] - upper[bucket])
        low = int(np.searchsorted(np.cumsum(lower[bucket]), place, side="right"))
        values.append(_from_sortable(bucket << 16 | low))
    return values


def _sortable(values: np.ndarray) -> np.ndarray:
    """float32 -> uint32 in the same order: bits of positive numbers grow with them, those of negative ones fall."""
    bits = (values + np.float32(0)).view(np.uint32)  # which makes 0 of -0
    return bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31))


def _from_sortable(word: int) -> float:
    bits = word & 0x7FFFFFFF if word >> 31 else ~word & 0xFFFFFFFF
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def keep_magnitudes(change: Tensor, low: float, high: float = float("inf")) -> Tensor:
    """Set to 0, in place, all elements but those with low <= |x| <= high."""
    if high < float("inf"):
        change -= torch.nn.functional.hardshrink(change, high)
    return at_least(change, low)


def at_least(values: Tensor, low: float) -> Tensor:
    """Set to 0, perhaps in place, all elements with |x| < low."""
    if low <= 0:
        return values
    if not np.isfinite(low):
        return values.zero_()
    # hardshrink keeps |x| > its argument; the next smaller float makes that >=.
    return torch.nn.functional.hardshrink(values, float(np.nextafter(np.float32(low), np.float32(0))))
