"""The stream: reads pieces of tensors, merges them, and writes each piece of the result to its position.

Memory is bounded by threads x models x piece, not by the model. Methods with a compiled form get pieces as arrays, as
stored in the files; the others get tensors in float32, for which torch is imported. The values of a tensor depend only
on the fixed piece size, so the files are byte-for-byte the same for any number of threads. Finished tensors are
recorded in a journal, and a run that was killed resumes from there.

On a GPU, the same methods work on larger pieces. Random masks are the same; sums are computed in another order and
with fused multiply-adds, so results agree with those of the CPU up to float32 rounding.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.method import Piece
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.merging.streaming.digests import DigestsInBackground
from hf_transfer_ext.weights.checkpoints import MAX_SHARD_BYTES, CheckpointWriter, plan_files
from hf_transfer_ext.weights.dtypes import F8_E4M3, F32, Dtype
from hf_transfer_ext.weights.opened import InputTensor, Scratch, StoredInput
from hf_transfer_ext.weights.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from hf_transfer_ext.merging.types import Values

logger = logging.getLogger(__name__)

#: Elements of a piece: few enough for the caches of a core, but enough to make the Python overhead small.
PIECE = 1 << 18

#: Elements of a piece for the kernels, which do not store results between operations.
STORED_PIECE = 1 << 19

#: Elements of a piece on a GPU: 32 MiB in float32, and about five times that per model with intermediate results.
DEVICE_PIECE = 1 << 23

#: A sample has one of every SAMPLE_STEP elements; this number shares no factor with most widths of matrices. If every
#: run must be read separately, it has at most SAMPLE elements, in runs of SAMPLE_RUN.
SAMPLE_STEP, SAMPLE, SAMPLE_RUN = 61, 1 << 17, 1 << 7

#: Bytes that all threads together may keep of tensors that are needed several times, so that they are read once.
HELD = 96 << 20

#: Elements of a tensor that one thread processes at a time if it does not need the whole tensor.
SEGMENT = 1 << 23


@dataclass
class StreamedPieces:
    """The pieces of one tensor (or of a segment of it) for a method's statistics and arithmetic.

    Args:
        check: Refuse NaN and infinity, in the first pass over the tensor.
        hold: A tensor of up to this many bytes is read once and kept in memory for later passes.
    """

    job: TensorJob
    scratch: Scratch
    start: int
    stop: int
    check: bool
    halt: threading.Event
    hold: int = 0
    held: list[Piece] = field(default_factory=list)

    @property
    def stored(self) -> bool:
        """Whether pieces are arrays for the kernels, in the dtype of the files where the kernels know it."""
        return _is_for_kernels(self.job, self.scratch.device)

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def count(self) -> int:
        return len(self.job.models)

    def __iter__(self) -> Iterator[tuple[Values | None, list[Values]]]:
        for piece in self.placed():
            yield piece.base, piece.models

    def sample(self) -> Iterator[tuple[Values | None, list[Values]]]:
        if self.numel <= elements_of(self.job, self.scratch.device) or self.job.method.unit == "matrix":
            yield from self
            return
        if self._is_held():
            for start, base, models, _ in self.placed():
                own = slice((self.start - start) % SAMPLE_STEP, None, SAMPLE_STEP)
                # The kernels take contiguous arrays only; others would be left to torch.
                own_base = None if base is None else np.ascontiguousarray(base.reshape(-1)[own])
                yield own_base, [np.ascontiguousarray(one.reshape(-1)[own]) for one in models]
            return
        columns = columns_of(self.job)
        run = min(-(-SAMPLE_RUN // columns) * columns, self.numel)
        runs = max(1, min(SAMPLE, self.numel // SAMPLE_STEP) // run)
        step = max(run, self.numel // runs // columns * columns)
        starts = range(self.start, self.stop - run + 1, step)
        base = None if self.job.base is None else self._read_runs(self.job.base, starts, run, 0)
        yield base, [self._read_runs(one, starts, run, slot + 1) for slot, one in enumerate(self.job.models)]

    def placed(self) -> Iterator[Piece]:
        if self.held:
            yield from self.held
            return
        step, hold = piece_of(self.job, self.scratch.device), self._is_held()
        pieces: list[Piece] = []
        for start in range(self.start, self.stop, step):
            if self.halt.is_set():
                raise InterruptedError("The merge was stopped.")
            piece = self._at(start, min(start + step, self.stop), number=len(pieces))
            if hold:
                pieces.append(piece)
            yield piece
        self.held, self.check = pieces, False  # only now, after the whole tensor was read

    def _is_held(self) -> bool:
        tensors = [self.job.base, *self.job.models] if self.job.base is not None else self.job.models
        nbytes = self.numel * sum(one.dtype.itemsize for one in tensors)
        return self.stored and nbytes <= self.hold and all(_is_stored(one) for one in tensors)

    def _at(self, start: int, stop: int, *, number: int) -> Piece:
        base = None if self.job.base is None else self._read(self.job.base, start, stop, 0, number)
        models = [self._read(one, start, stop, slot + 1, number) for slot, one in enumerate(self.job.models)]
        extra: dict[str, list[Tensor] | None] = {}
        slot = len(models) + 1
        for name, tensors in self.job.extra.items():
            extra[name] = [self._read_extra(name, one, start, stop, slot + i) for i, one in enumerate(tensors)] or None
            slot += len(tensors)
        return Piece(start, base, models, extra)

    def _read_extra(self, name: str, tensor: InputTensor, start: int, stop: int, slot: int) -> Tensor:
        """An extra tensor: the piece that corresponds to that of the weight, or all of a square one."""
        if self.job.method.extra[name].shape == "weight":
            return kernels.tensor_of(self._read(tensor, start, stop, slot, 0))
        out = self.scratch.floats(slot, math.prod(tensor.shape))
        tensor.read(0, out, self.scratch)
        self._refuse_nonfinite(tensor, out, 0)
        return out.reshape(tensor.shape)

    def _read_runs(self, tensor: InputTensor, starts: Sequence[int], run: int, slot: int) -> Values:
        """Several runs of a tensor, concatenated."""
        if self.stored and isinstance(tensor, StoredInput) and _is_stored(tensor):
            out: Values = tensor.stored_runs(starts, run, self.scratch, (slot, 0))
        else:
            floats = self.scratch.floats(slot, len(starts) * run)
            for i, start in enumerate(starts):
                tensor.read(start, floats[i * run : (i + 1) * run], self.scratch)
            out = floats.numpy() if self.stored else floats
        return out.reshape(-1, columns_of(self.job)) if self.job.method.unit == "row" else out

    def _read(self, tensor: InputTensor, start: int, stop: int, slot: int, number: int) -> Values:
        if self.stored and isinstance(tensor, StoredInput) and _is_stored(tensor):
            out: Values = tensor.stored(start, stop - start, self.scratch, (slot, number))
        else:
            floats = self.scratch.floats(slot, stop - start)
            tensor.read(start, floats, self.scratch)
            out = floats.numpy() if self.stored else floats
        self._refuse_nonfinite(tensor, out, start)
        if self.job.method.unit == "matrix":
            return out.reshape(self.job.shape)
        return out.reshape(-1, columns_of(self.job)) if self.job.method.unit == "row" else out

    def _refuse_nonfinite(self, tensor: InputTensor, values: Values, start: int) -> None:
        place = first_nonfinite(values) if self.check else -1
        if place < 0:
            return
        raise ValueError(
            f"Tensor {self.job.name!r} {self._role_of(tensor)} contains NaN or infinity, first at element "
            f"{start + place}. Fix the model, or pass --allow-nonfinite to merge it anyway."
        )

    def _role_of(self, tensor: InputTensor) -> str:
        roles = [("of the base model", self.job.base)]
        roles += [(f"of model {i + 1}", one) for i, one in enumerate(self.job.models)]
        for name, tensors in self.job.extra.items():
            roles += [(f"({name}) of model {i + 1}", one) for i, one in enumerate(tensors)]
        where = f" ({str(tensor.entry.file)!r})" if isinstance(tensor, StoredInput) else ""
        return next(role for role, one in roles if one is tensor) + where


@dataclass(frozen=True)
class _Task:
    job: TensorJob
    start: int
    stop: int


class Stream:
    """Processes jobs with several threads.

    Args:
        writer: Receives the result; it must have all tensors of the jobs.
        threads: Number of workers; each uses one torch thread.
        device: The device to compute on (`devices.resolve_device`).
        journal: File that records finished tensors.
        failure: File that is created when a tensor fails, which stops the streams of other processes.
        advance: Called with the number of input bytes that were processed.
        finish: Called with the name of each tensor that is completely written.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        *,
        threads: int,
        device: str = "cpu",
        journal: Path,
        failure: Path,
        seed: int = 0,
        allow_nonfinite: bool = False,
        advance: Callable[[int], object] = lambda count: None,
        finish: Callable[[str], object] = lambda name: None,
    ) -> None:
        self.writer, self.threads, self.seed = writer, threads, seed
        self.device = device
        self.failure = failure
        self.allow_nonfinite, self.advance, self.finish = allow_nonfinite, advance, finish
        self.journal = Journal(journal)
        self._halt = threading.Event()
        self._lock = threading.Lock()
        self._left: dict[str, int] = {}
        self._reported: set[str] = set()
        self._local = threading.local()

    def run(self, jobs: Sequence[TensorJob]) -> None:
        """Write the tensors of all jobs."""
        tasks = [task for job in jobs for task in _tasks_of(job, self.device)]
        for task in tasks:
            self._left[task.job.name] = self._left.get(task.job.name, 0) + 1
        tasks.sort(key=_order_of(tasks, self.threads))
        _keep_freed_memory()
        with one_torch_thread(jobs, self.device) as in_worker:
            pool = ThreadPoolExecutor(self.threads, initializer=in_worker)
            try:
                futures = [pool.submit(self._work, task) for task in tasks]
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
            except Exception:
                self.failure.touch()
                raise
            finally:
                self._halt.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self.journal.close()

    def _work(self, task: _Task) -> None:
        if self.failure.exists():
            raise InterruptedError("The merge was stopped because another process failed.")
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch(self.device)
            self._local.queue = _queue(self.device)
        with self._local.queue():
            if task.job.is_copy:
                self._copy(task)
            else:
                self._merge(task)
        with self._lock:
            self._left[task.job.name] -= 1
            if self._left[task.job.name] == 0:
                self.journal.finish(task.job.name)
                self.finish(task.job.name)

    def _merge(self, task: _Task) -> None:
        job, method = task.job, task.job.method
        hold = HELD // self.threads if method.statistics is not None else 0
        check = not self.allow_nonfinite
        pieces = StreamedPieces(job, self._local.scratch, task.start, task.stop, check, self._halt, hold)
        per_element = job.input_bytes / max(1, job.numel)
        for start, piece in method.over(pieces, noise=Noise(self.seed, job.name), **job.options):
            result = _in_dtype(piece, job.dtype)
            self._check_result(job, start, result)
            size = job.dtype.itemsize
            self.writer.write_bytes(job.name, start * size, memoryview(result.view(np.uint8)))  # type: ignore[arg-type]
            with self._lock:
                self.advance(round(per_element * len(result)))

    def _copy(self, task: _Task) -> None:
        job, size = task.job, task.job.dtype.itemsize
        source = job.models[0]
        if not isinstance(source, StoredInput):
            self._merge(task)
            return
        step = PIECE * 4
        for start in range(task.start * size, task.stop * size, step):
            if self._halt.is_set():
                raise InterruptedError("The merge was stopped.")
            raw = self._local.scratch.raw(min(step, task.stop * size - start))
            view = memoryview(raw)  # type: ignore[arg-type]
            source.checkpoint.read_bytes(source.entry, start, view)
            if job.dtype.is_floating_point:
                self._check_result(job, start // size, raw.view(job.dtype.numpy))
            self.writer.write_bytes(job.name, start, view)
            with self._lock:
                self.advance(len(view))

    def _check_result(self, job: TensorJob, start: int, result: np.ndarray) -> None:
        """Refuse NaN and infinity, or warn once per tensor if they are allowed."""
        bad = first_nonfinite(result, job.dtype)
        if bad < 0:
            return
        value = _nonfinite(result[bad : bad + 1], job.dtype)
        found = f"Tensor {job.name!r} of the result is {value} at element {start + bad}"
        if not self.allow_nonfinite:
            cause = "The input contains it" if job.is_copy else f"The result does not fit into {job.dtype}"
            raise ValueError(
                f"{found}. {cause}: fix the model, choose smaller weights or another `out_dtype`, or pass "
                "--allow-nonfinite to keep such values."
            )
        with self._lock:
            if job.name not in self._reported:
                self._reported.add(job.name)
                logger.warning("%s.", found)


def _is_stored(tensor: InputTensor) -> bool:
    return isinstance(tensor, StoredInput) and tensor.dtype in kernels.DTYPES


def _in_dtype(merged: Values, dtype: Dtype) -> np.ndarray:
    """A merged piece in one dimension, as it is stored: rounded to a dtype, in the memory of the host."""
    if isinstance(merged, np.ndarray):
        return kernels.convert(merged.reshape(-1), dtype)
    return kernels.array_of(merged.detach().reshape(-1).to(dtype.torch).cpu())


def first_nonfinite(values: Values, dtype: Dtype = F32) -> int:
    """Index of the first element that is NaN or infinite, -1 if there is none.

    Args:
        dtype: Of the elements of an array.
    """
    if kernels.can_take(values):
        return kernels.first_nonfinite(values)
    if isinstance(values, np.ndarray):
        bad = np.flatnonzero(_magnitude_bits(values, dtype) >= dtype.infinity)
        return int(bad[0]) if len(bad) else -1
    if math.isfinite(float(values.sum())):  # a non-finite element makes the sum non-finite: the fastest check
        return -1
    finite = values.isfinite()
    return -1 if bool(finite.all()) else int((~finite).nonzero()[0])


def _magnitude_bits(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """The bits of floats without their signs."""
    sign = 1 << (8 * dtype.itemsize - 1)
    bits: np.ndarray = np.bitwise_and(values.view(f"u{dtype.itemsize}"), np.array(sign - 1, f"u{dtype.itemsize}"))
    return bits


def _nonfinite(number: np.ndarray, dtype: Dtype) -> str:
    """`nan`, `inf` or `-inf`: what an element that is not finite is, by its bits."""
    bits, magnitude = number.view(f"u{dtype.itemsize}"), _magnitude_bits(number, dtype)
    if magnitude != dtype.infinity or dtype == F8_E4M3:  # which has no infinity
        return "nan"
    return "inf" if bits == magnitude else "-inf"


@contextmanager
def one_torch_thread(jobs: Sequence[TensorJob], device: str) -> Iterator[Callable[[], None]]:
    """Let torch use one thread for each worker, if the jobs need torch at all; yields what each worker calls first.

    The number of threads of torch is a property of each thread; sums depend on it.
    """
    if "torch" not in sys.modules and not any(_needs_torch(job, device) for job in jobs):
        yield lambda: None
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


def _needs_torch(job: TensorJob, device: str) -> bool:
    """Whether torch computes a part of a job, and not the kernels alone."""
    if job.is_copy:
        return not isinstance(job.models[0], StoredInput)
    tensors = [*job.models, *([] if job.base is None else [job.base])]
    rescaled = job.method.statistics is not None and bool(job.options.get("rescale"))  # `rescaling` sums in torch
    return rescaled or not _is_for_kernels(job, device) or not all(map(_is_stored, tensors))


def _queue(device: str) -> Callable[[], Any]:
    """A context in which a thread uses its own queue of a GPU: one thread copies while another computes."""
    if device == "cpu":
        return nullcontext
    import torch

    queue = torch.cuda.Stream(torch.device(device))
    return lambda: torch.cuda.stream(queue)


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of intermediate results.

    It immediately returns blocks above a limit to the system, and allocating new ones takes more time than the
    arithmetic on them. The limit adapts to the largest block that was freed.
    """
    np.empty(1 << 22, dtype=np.float32)


def _order_of(tasks: Sequence[_Task], threads: int) -> Callable[[_Task], int]:
    """Large tasks first, so that no thread works alone at the end; the others in the order of the files (digests)."""
    large = sum(task.stop - task.start for task in tasks) // (32 * threads)
    return lambda task: min(0, large - (task.stop - task.start))


def _tasks_of(job: TensorJob, device: str) -> list[_Task]:
    """Split a tensor into segments of whole pieces, unless the method needs all of it."""
    if not job.is_copy and (job.method.statistics is not None or job.method.unit == "matrix"):
        return [_Task(job, 0, job.numel)]
    piece = piece_of(job, device)
    step = max(1, SEGMENT // piece) * piece
    return [_Task(job, start, min(start + step, job.numel)) for start in range(0, job.numel, step)] or [
        _Task(job, 0, 0)
    ]


def elements_of(job: TensorJob, device: str) -> int:
    """Elements of a piece, before rounding to whole rows."""
    if device != "cpu":
        return DEVICE_PIECE
    return STORED_PIECE if _is_for_kernels(job, device) else PIECE


def _is_for_kernels(job: TensorJob, device: str) -> bool:
    return job.method.fast is not None and kernels.LIBRARY is not None and device == "cpu"


def piece_of(job: TensorJob, device: str) -> int:
    """Elements of a piece, rounded to whole rows for methods that need them; the whole tensor for matrix methods."""
    if job.method.unit == "matrix" and not job.is_copy:
        return max(1, job.numel)
    columns = columns_of(job)
    return max(1, elements_of(job, device) // columns) * columns


def columns_of(job: TensorJob) -> int:
    return max(1, job.shape[-1]) if job.method.unit == "row" and job.shape else 1


#: Names of the journals in the folder of a merge begin with this and end with the rank of the writing process.
JOURNAL = ".finished_tensors"

#: File in the folder of a merge that signals to all processes that one of them failed.
FAILURE = ".failed"


def write_tensors(
    folder: Path,
    jobs: Sequence[TensorJob],
    *,
    ranks: Ranks = Ranks(),  # noqa: B008
    threads: int,
    device: str = "cpu",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    seed: int = 0,
    allow_nonfinite: bool = False,
    advance: Callable[[int], object] = lambda count: None,
    digests: dict[str, str] | None = None,
) -> int:
    """Write the tensors of all jobs into a folder, split across the ranks; finished ones are skipped.

    Args:
        folder: Shared by all ranks (`resume.resumable_folder`); its tensors and journals are from the same jobs.
        advance: Called with the number of input bytes that were processed or are no longer needed.
        digests: Gets the SHA-256 of each file (name -> hex digest), computed meanwhile. A rank of several does not
            know what the others have written, and leaves it empty.

    Returns:
        Number of tensors that were already finished.
    """
    specs = [job.spec for job in jobs]
    planned = plan_files(specs, max_shard_bytes=max_shard_bytes)
    with ranks.together():  # the first rank creates the files, the others open them
        if ranks.is_first:
            (folder / FAILURE).unlink(missing_ok=True)  # a failed run that was killed may have left it
            if not all(file.is_begun(folder) for file in planned):
                for journal in folder.glob(f"{JOURNAL}-*"):  # they refer to files that are now rewritten
                    journal.unlink()
            CheckpointWriter(folder, specs, max_shard_bytes=max_shard_bytes, resume=True).close()
        finished = finished_tensors(folder)
    done: set[str] = ranks.gather(finished)[0]
    with ranks.together():
        left = [job for job in jobs if job.name not in done]
        share = {job.name for job in ranks.share_of(left)}
        own = [job for job in left if job.name in share]  # in the order of the files
        is_hashed = digests is not None and ranks.count == 1
        with (
            CheckpointWriter(folder, specs, max_shard_bytes=max_shard_bytes, resume=True) as writer,
            DigestsInBackground(folder, planned if is_hashed else [], done) as hashed,
        ):
            Stream(
                writer,
                threads=threads,
                device=device,
                journal=folder / f"{JOURNAL}-{ranks.rank}",
                failure=folder / FAILURE,
                seed=seed,
                allow_nonfinite=allow_nonfinite,
                advance=advance,
                finish=hashed.finish,
            ).run(own)
            if digests is not None:
                digests.update(hashed.result())
    return len(done)


class Journal:
    """A file with one line per finished tensor. A last line that was truncated by a kill is removed."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        whole = path.read_bytes().rpartition(b"\n")
        os.ftruncate(self._descriptor, len(whole[0] + whole[1]))
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def finish(self, name: str) -> None:
        os.write(self._descriptor, (json.dumps(name) + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)


def finished_tensors(folder: Path) -> set[str]:
    """The names in all journals of a folder; a last line without a newline is ignored."""
    lines = [line for path in folder.glob(f"{JOURNAL}-*") for line in path.read_text("utf-8").split("\n")[:-1]]
    return {json.loads(line) for line in lines}
