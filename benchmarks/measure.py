"""Time and memory of one step, each measurement in a separate process, methods side by side in rounds.

A benchmark writes one function that builds the inputs of a method and returns the step to measure:

    def step_of(method, tokens):          # in benchmarks/some_benchmark.py
        inputs = ...
        return lambda: run(method, inputs)

and has it run in a child by `measure_in_child("benchmarks.some_benchmark:step_of", {"method": "ours", ...})`.

- *wall* and *CPU* seconds are those of the step alone, all threads together for the latter.
- On a GPU the step runs once to warm up, then `repeats` times: *wall* is the median until the GPU is done, *growth*
  the peak of the memory allocated by torch during a step minus what was allocated before it.
- *Growth* is the peak of the resident memory during the step minus the resident memory right before it. The kernel's
  own high-water mark (VmHWM) is set back before the step through /proc/self/clear_refs, so that neither a transient of
  building the inputs hides the growth nor a sampling thread misses a short peak. Linux only.
- A child whose resident memory passes the limit, or that leaves the machine too little, is killed by the parent and
  recorded as out of memory, with what it had taken: the machine and the other measurements survive.

Run benchmarks from the root of the repository, as modules: `python -m benchmarks.kd_loss`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil

from hf_transfer_ext.files import write_text

Record = dict[str, Any]
Case = TypeVar("Case")
GB = 1e9
#: Bytes that a child leaves free: beyond, the kernel stops processes of its own choice, this one or somebody else's.
RESERVE = 1.5 * GB
OK, OUT_OF_MEMORY, FAILED, TIMED_OUT = "ok", "out of memory", "failed", "timed out"


def measure(step: Callable[[], Any], device: str = "cpu", repeats: int = 7) -> Record:
    """Run `step`, here: wall and CPU seconds, bytes taken before it, bytes by which they grew at the peak.

    The return value of the step is kept alive until all is measured; a dict of numbers is added to the record.
    """
    if device != "cpu":
        return _measure_on_gpu(step, repeats)
    gc.collect()
    _reset_peak()
    before = _status_bytes("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    result = step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _status_bytes("VmHWM")
    record = {
        "status": OK,
        "wall_s": wall,
        "cpu_s": cpu,
        "before_bytes": before,
        "growth_bytes": max(0, peak - before),
    }
    return record | (result if isinstance(result, dict) else {})


def _measure_on_gpu(step: Callable[[], Any], repeats: int) -> Record:
    from torch import cuda

    result = step()
    del result
    gc.collect()
    cuda.empty_cache()
    before, walls = cuda.memory_allocated(), []
    cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        cuda.synchronize()
        began = time.perf_counter()
        result = step()
        cuda.synchronize()
        walls.append(time.perf_counter() - began)
    record = {
        "status": OK,
        "wall_s": statistics.median(walls),
        "cpu_s": None,
        "before_bytes": before,
        "growth_bytes": cuda.max_memory_allocated() - before,
    }
    return record | (result if isinstance(result, dict) else {})


def measure_in_child(
    target: str, arguments: dict[str, Any], *, limit_bytes: float, timeout_s: float = 600.0, threads: int | None = None
) -> Record:
    """`measure(step)` in a fresh process, where `step = target(**arguments)` and `target` is "module:function".

    Never raises for what happens in the child; the record's `status` says what did: "ok", "out of memory" (killed at
    `limit_bytes` of resident memory, or by its own MemoryError), "timed out" or "failed", with the end of its output.
    """
    environment = dict(os.environ)
    if threads:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "record.json"), Path(folder, "log")
        with open(log, "wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.measure", target, json.dumps(arguments), str(result)],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                cwd=Path(__file__).parent.parent,
            )  # fmt: skip
            try:
                stopped, seen = _watch(child, limit_bytes, timeout_s)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if stopped:
            return {"status": stopped, "seen_bytes": seen}
        if child.returncode == 0:
            return json.loads(result.read_text())
        said = log.read_text(errors="replace")[-2000:]
        signs = ("MemoryError", "can't allocate memory", "not enough memory", "OutOfMemoryError")
        memory = any(sign in said for sign in signs)
        return {"status": OUT_OF_MEMORY if memory else FAILED, "seen_bytes": seen, "output": said}


def rounds_of(cases: Sequence[Case], rounds: int, first: int = 0) -> Iterator[tuple[int, Case]]:
    """Every case once per round, in an order that rotates by one each round, so that no case always runs first.

    `first` is the number of the first round, where earlier sittings have had some.
    """
    for number in range(first, first + rounds):
        turn = number % max(1, len(cases))
        for case in (*cases[turn:], *cases[:turn]):
            yield number, case


def median(records: Iterable[Record], field: str) -> float | None:
    """Median of a field over the completed records; None if there are none."""
    values = [record[field] for record in records if record["status"] == OK and record[field] is not None]
    return statistics.median(values) if values else None


def paired_ratio(records: Iterable[Record], reference: Iterable[Record], field: str) -> float | None:
    """Median over the rounds of `record / reference`, both of the same round: a slow spell of the machine cancels."""
    of_round = {record["round"]: record[field] for record in reference if record["status"] == OK}
    ratios = [
        record[field] / of_round[record["round"]]
        for record in records
        if record["status"] == OK and record[field] is not None and of_round.get(record["round"])
    ]
    return statistics.median(ratios) if ratios else None


def memory_limit(share: float = 0.85, ceiling: float = 19 * GB) -> float:
    """Resident bytes that a child may use: `share` of what is free now, at most `ceiling`."""
    return min(ceiling, share * psutil.virtual_memory().available)


def machine(packages: Sequence[str] = ()) -> Record:
    """What the numbers depend on: processor, memory, system and the versions of `packages`."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        processor += " with one " + sys.modules["torch"].cuda.get_device_name()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / GB, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are right-aligned. None is shown as a dash."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    lines += [["–" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def report_steps(
    title: str, command: str, rounds: int, facts: Record, table: str, out: Path | None, content: Record
) -> None:
    """Print the page of a benchmark of single steps, and write it and its records to `out`, if that is given."""
    stated = ", ".join(f"{name} {value}" for name, value in facts.items())
    page = "\n".join([f"# {title}", "", f"`{command}`: medians of {rounds} rounds; {stated}.", "", table])
    print(page)
    if out:
        write_text(out.with_suffix(".md"), page + "\n")
        write_json(out.with_suffix(".json"), content)


def _watch(child: subprocess.Popen, limit_bytes: float, timeout_s: float) -> tuple[str | None, int]:
    """Wait for the child; kill it beyond its limits. Returns why it was stopped, and the most memory seen."""
    seen, end = 0, time.monotonic() + timeout_s
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            seen = max(seen, process.memory_info().rss)
        except psutil.Error:  # it ended between the two lines
            break
        full = seen > limit_bytes or psutil.virtual_memory().available < RESERVE
        if full or time.monotonic() > end:
            child.kill()
            child.wait()
            return (OUT_OF_MEMORY if full else TIMED_OUT), seen
        time.sleep(0.02)
    child.wait()
    return None, seen


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise OSError(
            "Peak memory is read from /proc of Linux, and /proc/self/clear_refs cannot be written."
        ) from error


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory is measured on Linux only.")


def _child(target: str, arguments: str, result: str) -> None:
    module, function = target.split(":")
    given = json.loads(arguments)
    step = getattr(importlib.import_module(module), function)(**given)
    Path(result).write_text(json.dumps(measure(step, given.get("device", "cpu"))))


if __name__ == "__main__":
    _child(*sys.argv[1:])


class OutOfTime(Exception):
    """A benchmark's `--minutes` are over; the same command continues."""


def stop_in_time(options: argparse.Namespace) -> None:
    """Raise `OutOfTime` once `options.minutes` have passed since `options.began` (`time.monotonic()`)."""
    if options.minutes is not None and time.monotonic() - options.began > 60 * options.minutes:
        raise OutOfTime
