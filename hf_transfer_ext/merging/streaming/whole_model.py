"""Trimming over the whole model: one threshold for the changes of all tensors, exact and without keeping them.

A sample of all tensors says between which two numbers the threshold lies. One pass counts what lies below, and what
lies between for every float32 number by itself. Where the sample misleads, or the two numbers are far apart, passes
with coarser counts narrow them down first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_transfer_ext.merging.arithmetic.trimming import magnitudes
from hf_transfer_ext.merging.method import for_each
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.merging.streaming.stream import SEGMENT, StreamedPieces
from hf_transfer_ext.weights.opened import Scratch
from hf_transfer_ext.weights.ranks import Ranks

#: Numbers between which one pass can tell, and elements of all tensors that are looked at before.
BINS = SAMPLED = 1 << 20

#: Bits of float32 numbers that are not negative; they grow with the numbers.
_END = 1 << 31


def with_model_thresholds(
    jobs: Sequence[TensorJob],
    *,
    threads: int,
    device: torch.device | None = None,
    allow_nonfinite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> list[TensorJob]:
    """Give the jobs with `trim_over_model` their thresholds: for each model the smallest magnitude that is kept.

    Of the n elements of a model's change in all these jobs the int(density * n) largest are kept, and what ties with
    the smallest of them.

    Raises:
        ValueError: The density is not the same in all tensors, or an input holds NaN or infinity.
    """
    chosen = [job for job in jobs if job.options.get("trim_over_model") and not job.is_copy]
    if not chosen:
        return list(jobs)
    densities = sorted({tuple(for_each(job.options["density"], job.models)) for job in chosen})
    if len(densities) > 1:
        raise ValueError(
            "`trim_over_model` compares the changes of all tensors, so `density` has to be one number for each model, "
            f"got {list(densities[0])} and {list(densities[1])}. Take its gradients and filters away."
        )
    search = _Search(chosen, threads, device or torch.device("cpu"), not allow_nonfinite, ranks)
    options = {"thresholds": search.thresholds(densities[0])}
    names = {job.name for job in chosen}
    return [replace(job, options={**job.options, **options}) if job.name in names else job for job in jobs]


@dataclass
class _Window:
    """The bit patterns low .. high - 1, among which the element of a rank is looked for."""

    rank: int
    low: int
    high: int

    @property
    def shift(self) -> int:
        """Bits that are cut off so that the patterns fall into BINS bins."""
        return max(0, (self.high - self.low - 1).bit_length() - BINS.bit_length() + 1)

    def narrowed(self, below: int, bins: np.ndarray) -> _Window:
        """The window of one bin, or everything where the rank lies outside of this window."""
        place = self.rank - below
        if not 0 <= place < int(bins.sum()):
            return _Window(self.rank, 0, _END)
        low = self.low + (int(np.searchsorted(np.cumsum(bins), place, side="right")) << self.shift)
        return _Window(self.rank, low, low + (1 << self.shift))


class _Search:
    def __init__(
        self, jobs: Sequence[TensorJob], threads: int, device: torch.device, check: bool, ranks: Ranks
    ) -> None:
        self.jobs, self.threads, self.device, self.check, self.ranks = jobs, threads, device, check, ranks
        self.numel = sum(job.numel for job in jobs)
        self._local = threading.local()

    def thresholds(self, densities: Sequence[float]) -> list[float]:
        kept = [int(density * self.numel) for density in densities]
        windows: dict[int, _Window] = {}
        with self.ranks.together():
            for i, sample in enumerate(self._sample()):
                if 0 < kept[i] < self.numel:
                    windows[i] = self._first_window(sample, self.numel - kept[i])
        found = [0.0 if count else float("inf") for count in kept]
        while windows:
            with self.ranks.together():
                counts = self._count(windows)
            counts = [sum(parts[1:], parts[0]) for parts in zip(*self.ranks.gather(counts), strict=True)]
            for (i, window), count in zip(list(windows.items()), counts, strict=True):
                windows[i] = window.narrowed(int(count[-1]), count[:-1])
                if windows[i].high - windows[i].low == 1:
                    found[i] = float(np.array(windows.pop(i).low, dtype=np.int32).view(np.float32))
        return found

    def _first_window(self, sample: np.ndarray, rank: int) -> _Window:
        """8 standard deviations to both sides, as if the sample's elements were independent."""
        size, place = len(sample), rank / self.numel
        margin = 8 * (size * place * (1 - place)) ** 0.5 + 16
        low, high = int(place * size - margin), int(place * size + margin) + 1
        return _Window(rank, int(sample[low]) if low >= 0 else 0, int(sample[high]) + 1 if high < size else _END)

    def _sample(self) -> list[np.ndarray]:
        """For each model the sorted bit patterns of some magnitudes, from each tensor in proportion to its size."""
        parts: list[list[np.ndarray]] = []
        for job in self.jobs:
            pieces = StreamedPieces(job, self._scratch(), 0, job.numel, False, threading.Event())
            bits = [_bits(base, models) for base, models in pieces.sample()]
            whole = [np.concatenate(one) for one in zip(*bits, strict=True)]
            step = max(1, len(whole[0]) * self.numel // max(1, SAMPLED * job.numel))
            parts.append([one[::step].copy() for one in whole])
        return [np.sort(np.concatenate(one)) for one in zip(*parts, strict=True)]

    def _count(self, windows: dict[int, _Window]) -> list[np.ndarray]:
        """For each window the elements in its bins, and those below it, in the tensors of this rank."""
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

        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, self._tasks()))
        self.check = False  # the first pass has seen everything
        return totals

    def _tasks(self) -> Iterator[tuple[TensorJob, int]]:
        for job in self.ranks.share_of(self.jobs):
            yield from ((job, start) for start in range(0, job.numel, SEGMENT))

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch(self.device)
        scratch: Scratch = self._local.scratch
        return scratch


def _bits(base: torch.Tensor | None, models: list[torch.Tensor]) -> list[np.ndarray]:
    return [one.values().reshape(-1).cpu().numpy().view(np.int32) for one in magnitudes(base, models)]


def _counted(bits: np.ndarray, window: _Window) -> tuple[int, np.ndarray]:
    below = bits < np.int32(window.low)
    inside = bits >= np.int32(window.low)
    if window.high < _END:
        inside &= bits < np.int32(window.high)
    bins = (bits[np.flatnonzero(inside)] - np.int32(window.low)) >> window.shift
    return int(np.count_nonzero(below)), np.bincount(bins)
