"""Trimming over the whole model: one exact threshold for the changes of all tensors, in bounded memory.

A magnitude is searched by its rank among all tensors, as the bits of a float32 number, which increase with it:

    0 ........... low [ bin | bin | bin | ... | bin ] high ........... 2**31
                          ^ the bin with the rank becomes the next window, until a bin is a single number

A sample of all tensors gives the first window. Each pass counts the numbers below the window and in each of its bins.
The first window usually has at most as many numbers as bins, so that one pass is sufficient. If the sample was
misleading, the search restarts with a window that contains everything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hf_transfer_ext.merging.arithmetic.selection import as_array
from hf_transfer_ext.merging.arithmetic.trimming import magnitudes
from hf_transfer_ext.merging.method import for_each
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.merging.streaming.stream import SEGMENT, StreamedPieces, one_torch_thread
from hf_transfer_ext.weights.opened import Scratch
from hf_transfer_ext.weights.ranks import Ranks

if TYPE_CHECKING:
    from hf_transfer_ext.merging.types import Values

#: Bins of a window, and elements in the sample of all tensors.
BINS = SAMPLED = 1 << 20

#: Upper limit of the bits of non-negative float32 numbers.
_END = 1 << 31


def with_model_thresholds(
    jobs: Sequence[TensorJob],
    *,
    threads: int,
    device: str = "cpu",
    allow_nonfinite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> list[TensorJob]:
    """Set the thresholds of the jobs with `trim_over_model`: for each model, the smallest kept magnitude.

    Of the n elements of a model's change in all these jobs, the int(density * n) largest are kept, and those that tie
    with the smallest of them.

    Raises:
        ValueError: The density is not the same in all tensors, or an input contains NaN or infinity.
    """
    chosen = [job for job in jobs if job.options.get("trim_over_model") and not job.is_copy]
    if not chosen:
        return list(jobs)
    densities = sorted({tuple(for_each(job.options["density"], job.models)) for job in chosen})
    if len(densities) > 1:
        raise ValueError(
            "`trim_over_model` compares the changes of all tensors, so `density` must be one number per model, "
            f"got {list(densities[0])} and {list(densities[1])}. Remove its gradients and filters."
        )
    search = _Search(chosen, threads, device, not allow_nonfinite, ranks)
    options = {"thresholds": search.thresholds(densities[0])}
    names = {job.name for job in chosen}
    return [replace(job, options={**job.options, **options}) if job.name in names else job for job in jobs]


@dataclass(frozen=True)
class _Window:
    """The bit patterns low .. high - 1, which are expected to contain that of a rank."""

    rank: int
    low: int
    high: int

    @property
    def is_found(self) -> bool:
        return self.high - self.low == 1

    @property
    def value(self) -> float:
        """The number with the lowest bit pattern in the window."""
        return float(np.array(self.low, dtype=np.int32).view(np.float32))

    @property
    def shift(self) -> int:
        """Number of low bits to drop so that the patterns fit into BINS bins."""
        return max(0, (self.high - self.low - 1).bit_length() - BINS.bit_length() + 1)

    def narrowed(self, below: int, bins: np.ndarray) -> _Window:
        """The window of the bin with the rank, or everything if the rank is outside of this window."""
        place = self.rank - below
        if not 0 <= place < int(bins.sum()):
            return _Window(self.rank, 0, _END)
        low = self.low + (int(np.searchsorted(np.cumsum(bins), place, side="right")) << self.shift)
        return _Window(self.rank, low, low + (1 << self.shift))


class _Search:
    """Finds the thresholds of all models together: each pass over the tensors counts for all windows."""

    def __init__(self, jobs: Sequence[TensorJob], threads: int, device: str, check: bool, ranks: Ranks) -> None:
        self.jobs, self.threads, self.device, self.check, self.ranks = jobs, threads, device, check, ranks
        self.numel = sum(job.numel for job in jobs)
        self._local = threading.local()

    def thresholds(self, densities: Sequence[float]) -> list[float]:
        """For each model, the smallest kept magnitude; 0 if all are kept, infinity if none is."""
        counts = [int(density * self.numel) for density in densities]
        found = [0.0 if count else float("inf") for count in counts]
        with self.ranks.together():
            windows = self._first_windows(counts)
        while windows:
            for i, window in self._narrowed(windows).items():
                windows[i] = window
                if window.is_found:
                    found[i] = windows.pop(i).value
        return found

    def _first_windows(self, counts: Sequence[int]) -> dict[int, _Window]:
        """model -> its window, for models that keep some elements but not all."""
        samples = self._sample()
        return {
            i: self._first_window(samples[i], self.numel - count)
            for i, count in enumerate(counts)
            if 0 < count < self.numel
        }

    def _first_window(self, sample: np.ndarray, rank: int) -> _Window:
        """A margin of 8 standard deviations on both sides, assuming independent elements in the sample."""
        size, place = len(sample), rank / self.numel
        margin = 8 * (size * place * (1 - place)) ** 0.5 + 16
        low, high = int(place * size - margin), int(place * size + margin) + 1
        return _Window(rank, int(sample[low]) if low >= 0 else 0, int(sample[high]) + 1 if high < size else _END)

    def _narrowed(self, windows: dict[int, _Window]) -> dict[int, _Window]:
        """The windows after another pass over the tensors; each rank counts its own share."""
        with self.ranks.together():
            own = self._count(windows)
        of_all = [sum(parts[1:], parts[0]) for parts in zip(*self.ranks.gather(own), strict=True)]
        return {
            i: window.narrowed(int(count[-1]), count[:-1])
            for (i, window), count in zip(windows.items(), of_all, strict=True)
        }

    def _sample(self) -> list[np.ndarray]:
        """For each model, sorted bit patterns of some magnitudes, from each tensor in proportion to its size."""
        parts: list[list[np.ndarray]] = []
        for job in self.jobs:
            pieces = StreamedPieces(job, self._scratch(), 0, job.numel, False, threading.Event())
            bits = [_bits(base, models) for base, models in pieces.sample()]
            whole = [np.concatenate(one) for one in zip(*bits, strict=True)]
            step = max(1, len(whole[0]) * self.numel // max(1, SAMPLED * job.numel))
            parts.append([one[::step].copy() for one in whole])
        return [np.sort(np.concatenate(one)) for one in zip(*parts, strict=True)]

    def _count(self, windows: dict[int, _Window]) -> list[np.ndarray]:
        """For each window, the counts in its bins and, last, below it, for the tensors of this rank."""
        totals = [np.zeros(BINS + 1, dtype=np.int64) for _ in windows]
        lock = threading.Lock()

        def work(task: tuple[TensorJob, int]) -> None:
            job, start = task
            stop = min(start + SEGMENT, job.numel)
            pieces = StreamedPieces(job, self._scratch(), start, stop, self.check, threading.Event())
            for base, models in pieces:
                bits = _bits(base, models)
                counted = [_counted(bits[i], window) for i, window in windows.items()]
                with lock:
                    for total, (below, bins) in zip(totals, counted, strict=True):
                        total[-1] += below
                        total[: len(bins)] += bins

        with one_torch_thread(self.jobs, self.device) as in_worker:
            with ThreadPoolExecutor(self.threads, initializer=in_worker) as pool:
                list(pool.map(work, self._tasks()))
        self.check = False  # the first pass has checked all elements
        return totals

    def _tasks(self) -> Iterator[tuple[TensorJob, int]]:
        for job in self.ranks.share_of(self.jobs):
            yield from ((job, start) for start in range(0, job.numel, SEGMENT))

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch(self.device)
        scratch: Scratch = self._local.scratch
        return scratch


def _bits(base: Values | None, models: Sequence[Values]) -> list[np.ndarray]:
    return [as_array(one).view(np.int32) for one in magnitudes(base, models)]


def _counted(bits: np.ndarray, window: _Window) -> tuple[int, np.ndarray]:
    below = bits < np.int32(window.low)
    inside = bits >= np.int32(window.low)
    if window.high < _END:
        inside &= bits < np.int32(window.high)
    bins = (bits[np.flatnonzero(inside)] - np.int32(window.low)) >> window.shift
    return int(np.count_nonzero(below)), np.bincount(bins)
