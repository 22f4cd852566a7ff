"""What faults do to a job: kills, full disks, inputs that change, two runs into one folder.

    python -m benchmarks.faults --out benchmarks/results/faults

runs each job on tiny models, disturbs it, and runs it again. Counted as a loss is everything but these: while the
first run is disturbed, the output folder is absent (or, with `--overwrite`, still the old result or already the new
one), and nothing else of the user is touched; the second run ends with the bytes of an undisturbed run, and nothing
is left beside the output folder. Where the first run cannot be repeated (its inputs changed), an error counts as
right, and a result only if it is that of an undisturbed run.

- kill: SIGKILL after a random time, up to the length of an undisturbed run.
- terminate: SIGTERM, likewise.
- kill at a call: SIGKILL before the n-th call that opens, writes, renames, ... a file, for n spread evenly over a
  run that replaces an older result.
- full disk: writing fails with ENOSPC after n bytes, and on a file system with too little room, if it can be mounted.
- file size limit: RLIMIT_FSIZE ends the writing of large files.
- read-only: the file system of the output is read-only, if it can be mounted.
- input rewritten, input deleted: while the job works.
- two runs: at the same time, into one folder.

Jobs run in forked processes, so that each costs milliseconds instead of the start of Python. Those that train or
score (`benchmarks.long_jobs`) are killed and terminated; what they leave beside the output folder to go on from, and a
cache that grows in place, are no losses.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import long_jobs
from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.files import write_text
from hf_transfer_ext.hub.record import RECORD_FILE
from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.moe import assemble
from hf_transfer_ext.weights.checkpoints import Checkpoint

Content = dict[str, bytes]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}

#: Calls that change files; a kill is aimed at each of them.
CALLS = (
    "open", "write", "pwrite", "posix_fallocate", "ftruncate", "mkdir", "rename", "replace", "unlink", "rmdir",
    "chmod",
)  # fmt: skip


def make_models(folder: Path) -> None:
    """A base and two fine-tunes of it, with all random numbers from one seed."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes: dict[str, tuple[Any, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(4):
        place = f"model.layers.{layer}."
        shapes |= {f"{place}self_attn.{kind}_proj.weight": (hidden, hidden) for kind in "qkvo"}
        shapes |= {f"{place}mlp.{kind}_proj.weight": (inner, hidden) for kind in ("gate", "up")}
        shapes[f"{place}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{place}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for number, name in enumerate(("base", "one", "two")):
        path = folder / name
        path.mkdir(parents=True)
        matrices = {key: value for key, value in base.items() if value.dim() == 2 and "layers" in key}
        tuned = {
            key: value + number * torch.randn(value.shape, generator=generator) for key, value in matrices.items()
        }
        save_file({**base, **tuned}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(CONFIG))


@dataclass(frozen=True)
class Job:
    """One way of creating a result from the models.

    Args:
        is_long: It trains or scores: a fault is a signal, and the second run is a process of its own.
        beside: Endings of what may stand beside the output folder, to go on from.
        in_place: Its output folder grows file by file; what counts is the folder after the second run.
        timed: Names of files that hold times or counts of the work that was done.
    """

    name: str
    run: Callable[[Path, Path, bool], object]
    is_long: bool = False
    beside: tuple[str, ...] = ()
    in_place: bool = False
    timed: tuple[str, ...] = ()

    def content_of(self, folder: Path) -> Content:
        """File -> content, without the card, the record and `timed`."""
        unlike = ("README.md", RECORD_FILE, *self.timed)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unlike)
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _plan(models: Path) -> dict[str, Any]:
    entries = [{"model": str(models / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in ("one", "two")]
    return {"merge_method": "ties", "base_model": str(models / "base"), "models": entries}


def _merge(models: Path, out: Path, overwrite: bool) -> object:
    return merge(_plan(models), out, overwrite=overwrite, threads=2, max_shard_bytes=30_000)


def _merge_to_lora(models: Path, out: Path, overwrite: bool) -> object:
    return merge(_plan(models), out, overwrite=overwrite, lora_rank=4)


def _extract(models: Path, out: Path, overwrite: bool) -> object:
    return extract_lora(models / "base", models / "one", out, rank=4, overwrite=overwrite)


def _moe(models: Path, out: Path, overwrite: bool) -> object:
    experts = [{"source_model": str(models / name)} for name in ("one", "two")]
    plan = {"base_model": str(models / "base"), "gate_mode": "random", "experts": experts}
    return assemble(plan, out, overwrite=overwrite, threads=2)


JOBS = {
    job.name: job
    for job in (
        Job("merge", _merge),
        Job("merge to LoRA", _merge_to_lora),
        Job("extract", _extract),
        Job("moe", _moe),
        Job("distill", long_jobs.run_distill, is_long=True, beside=(".training",)),
        Job("distill a classifier", long_jobs.run_classifier, is_long=True, beside=(".training",)),
        Job("distill an embedder", long_jobs.run_embedder, is_long=True, beside=(".training",)),
        Job("unlearn", long_jobs.run_unlearn, is_long=True, beside=(".training",)),
        Job("cache-teacher", long_jobs.run_cache_teacher, is_long=True, in_place=True),
        Job("transfer", long_jobs.run_transfer, is_long=True),
        Job(
            "evaluate",
            long_jobs.run_evaluate,
            is_long=True,
            beside=(".scores",),
            in_place=True,
            timed=("measurements.json",),
        ),
        Job("audit", long_jobs.run_audit, is_long=True, in_place=True),
    )
}


@dataclass
class Tally:
    """How often a job was hit by a fault, and what was lost.

    Args:
        count: Disturbed runs.
        hit: Those that the fault ended; the others were over before it came.
        losses: What went wrong, one sentence each.
    """

    job: str
    fault: str
    count: int = 0
    hit: int = 0
    losses: list[str] = field(default_factory=list)


class Bench:
    """Tiny models, and the bytes that each job creates from them without faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = folder / "models"
        make_models(self.models)
        long_jobs.make_language_models(self.models)
        self.expected: dict[str, Content] = {}
        self.seconds: dict[str, float] = {}

    def prepare(self, job: Job) -> None:
        if job.name in self.expected:
            return
        folder = self.folder / "undisturbed"
        out = folder / "out"
        for run in range(3):  # the first ones import
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if not job.is_long and run < 2:
                job.run(self.models, out, False)
                continue
            began = time.perf_counter()
            status = forked(lambda: job.run(self.models, out, False))
            self.seconds[job.name] = time.perf_counter() - began
            if status:
                raise RuntimeError(f"The job {job.name} ended with status {status} without any fault.")
            content = job.content_of(out)
            if content != self.expected.setdefault(job.name, content):
                unlike = sorted(name for name in content if content[name] != self.expected[job.name].get(name))
                raise RuntimeError(f"Two undisturbed runs of the job {job.name} differ in {unlike}.")
        shutil.rmtree(folder)


def forked(function: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """Run a function in a separate process; returns its status, negative for a signal, 1 for an error."""
    return os.waitstatus_to_exitcode(os.waitpid(started(function, prepare), 0)[1])


def started(function: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        prepare()
        function()
        status = 0
    finally:
        os._exit(status)


def judge(
    tally: Tally, bench: Bench, job: Job, box: Path, *, models: Path | None = None, old: Content | None = None
) -> None:
    """Check what a disturbed run left in `box`, run the job again, and check again."""
    out, expected = box / "out", bench.expected[job.name]
    now = job.content_of(out) if out.exists() else None
    if not job.in_place and (now not in (None, expected) if old is None else now not in (old, expected)):
        tally.losses.append(f"the folder held {sorted(now or {})} after the fault")
    if models is None:
        replaces = now is not None or old is not None
        try:
            if job.is_long:
                status = forked(lambda: job.run(bench.models, out, replaces))
                if status:
                    raise RuntimeError(f"status {status}")
            else:
                job.run(bench.models, out, replaces)
        except Exception as error:
            tally.losses.append(f"the second run failed: {error}")
            return
        again = job.content_of(out)
        if again != expected:
            unlike = sorted(name for name in again.keys() | expected.keys() if again.get(name) != expected.get(name))
            tally.losses.append(f"the second run made other bytes: {unlike}")
        known = ("out", "thesis.txt", *(f"out{ending}" for ending in job.beside))
        left = sorted(path.name for path in box.iterdir() if path.name not in known)
        if left:
            tally.losses.append(f"left beside the folder: {left}")
    if (box / "thesis.txt").read_text() != "mine":
        tally.losses.append("a file beside the folder changed")


@contextlib.contextmanager
def box_of(bench: Bench) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        (Path(name) / "thesis.txt").write_text("mine")
        yield Path(name)


def kill(bench: Bench, job: Job, count: int) -> Tally:
    return signaled(bench, job, count, "kill", signal.SIGKILL)


def terminate(bench: Bench, job: Job, count: int) -> Tally:
    return signaled(bench, job, count, "terminate", signal.SIGTERM)


def signaled(bench: Bench, job: Job, count: int, fault: str, number: signal.Signals) -> Tally:
    """At random moments of the run."""
    tally, moments = Tally(job.name, fault), random.Random(job.name)
    while tally.count < count:
        with box_of(bench) as box:
            child = started(lambda: job.run(bench.models, box / "out", False))
            time.sleep(moments.uniform(0, bench.seconds[job.name]))
            os.kill(child, number)
            tally.hit += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number
            tally.count += 1
            judge(tally, bench, job, box)
    return tally


def kill_at_call(bench: Bench, job: Job, count: int) -> Tally:
    """At all calls, or at `count` evenly spaced ones."""
    tally = Tally(job.name, "kill at a call")

    def counted(stop: int, report: Path | None = None) -> Callable[[], None]:
        def prepare() -> None:
            seen = 0

            def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal seen
                    if seen == stop:
                        os.kill(os.getpid(), signal.SIGKILL)
                    seen += 1
                    if report is not None:
                        os.truncate(report, seen)
                    return real(*arguments, **options)

                return call

            for name in CALLS:
                setattr(os, name, wrapped(getattr(os, name)))

        return prepare

    with box_of(bench) as box:
        report = box / "report"
        report.touch()
        old_job(bench, job, box)
        forked(lambda: job.run(bench.models, box / "out", True), counted(-1, report))
        calls = report.stat().st_size
    for place in range(0, calls, max(1, calls // count)):
        with box_of(bench) as box:
            old = old_job(bench, job, box)
            status = forked(lambda: job.run(bench.models, box / "out", True), counted(place))
            tally.count, tally.hit = tally.count + 1, tally.hit + (status == -signal.SIGKILL)
            judge(tally, bench, job, box, old=old)
    return tally


def old_job(bench: Bench, job: Job, box: Path) -> Content:
    """An older result that the run replaces."""
    shutil.copytree(bench.models / "one", box / "out")
    (box / "out" / "vocab.txt").write_text("an older result")
    return job.content_of(box / "out")


def full_disk(bench: Bench, job: Job, count: int) -> Tally:
    tally, sizes = Tally(job.name, "full disk"), random.Random(job.name)
    total = sum(map(len, bench.expected[job.name].values()))

    def limited(room: int) -> Callable[[], None]:
        def prepare() -> None:
            real, left = os.pwrite, room

            def pwrite(descriptor: int, view: Any, offset: int) -> int:
                nonlocal left
                left -= len(view)
                if left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(descriptor, view, offset)

            os.pwrite = pwrite

        return prepare

    for _ in range(count):
        with box_of(bench) as box:
            work = lambda: job.run(bench.models, box / "out", False)  # noqa: E731
            status = forked(work, limited(sizes.randrange(total)))
            tally.count, tally.hit = tally.count + 1, tally.hit + (status == 1)
            left = sorted(path.name for path in box.iterdir())
            if status == 1 and left != ["thesis.txt"]:
                tally.losses.append(f"left after the error: {left}")
            judge(tally, bench, job, box)
    return tally


@contextlib.contextmanager
def mounted(box: Path, options: str) -> Iterator[Path | None]:
    """A small separate file system in `box`, or None without permission to mount."""
    place = box / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def small_disk(bench: Bench, job: Job, count: int) -> Tally:
    tally = Tally(job.name, "file system with too little room")
    total = sum(map(len, bench.expected[job.name].values()))
    for number in range(min(count, 3)):
        with box_of(bench) as box, mounted(box, f"size={total * (number + 1) // 4 // 4096 * 4096}") as disk:
            if disk is None:
                return tally
            (disk / "thesis.txt").write_text("mine")
            status = forked(lambda: job.run(bench.models, disk / "out", False))
            tally.count, tally.hit = tally.count + 1, tally.hit + (status == 1)
            left = sorted(path.name for path in disk.iterdir())
            if left != ["thesis.txt"]:
                tally.losses.append(f"left after the error: {left}")
            subprocess.run(["mount", "-o", "remount,size=100M", str(disk)], check=True, capture_output=True)
            judge(tally, bench, job, disk)
    return tally


def file_limit(bench: Bench, job: Job, count: int) -> Tally:
    tally = Tally(job.name, "file size limit")
    largest = max(map(len, bench.expected[job.name].values()))
    for number in range(min(count, 5)):
        limit = largest * (number + 1) // 6
        with box_of(bench) as box:
            work = lambda: job.run(bench.models, box / "out", False)  # noqa: E731
            status = forked(work, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # noqa: B023
            tally.count, tally.hit = tally.count + 1, tally.hit + (status == 1)
            judge(tally, bench, job, box)
    return tally


def read_only(bench: Bench, job: Job, count: int) -> Tally:
    tally = Tally(job.name, "read-only")
    with box_of(bench) as box, mounted(box, "size=10M") as disk:
        if disk is None:
            return tally
        (disk / "thesis.txt").write_text("mine")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        status = forked(lambda: job.run(bench.models, disk / "out", False))
        tally.count, tally.hit = 1, int(status == 1)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True, capture_output=True)
        judge(tally, bench, job, disk)
    return tally


def changed_input(bench: Bench, job: Job, count: int, *, delete: bool) -> Tally:
    """After a random number of reads of stored tensors."""
    tally, places = Tally(job.name, f"input {'deleted' if delete else 'rewritten'}"), random.Random(job.name)

    def changing(models: Path, place: int, name: str) -> Callable[[], None]:
        file = models / "one" / name

        def prepare() -> None:
            real, seen = Checkpoint.read_bytes, 0

            def read_bytes(self: Any, *arguments: Any) -> None:
                nonlocal seen
                seen += 1
                if seen == place:
                    content = file.read_bytes()
                    file.unlink() if delete else file.write_bytes(content[:-2] + b"\0" + content[-1:])
                real(self, *arguments)

            Checkpoint.read_bytes = read_bytes  # type: ignore[method-assign]

        return prepare

    for number in range(count):
        name = "config.json" if number % 4 == 3 else "model.safetensors"
        with box_of(bench) as box:
            models = box / "inputs" / "models"
            shutil.copytree(bench.models, models)
            place = places.randint(1, 30)
            status = forked(lambda: job.run(models, box / "out", False), changing(models, place, name))  # noqa: B023
            tally.count, tally.hit = tally.count + 1, tally.hit + (status == 1)
            if status == 1 and (box / "out").exists():
                tally.losses.append("a folder was published in spite of the error")
            shutil.rmtree(box / "inputs")
            judge(tally, bench, job, box, models=models)
    return tally


def input_rewritten(bench: Bench, job: Job, count: int) -> Tally:
    return changed_input(bench, job, count, delete=False)


def input_deleted(bench: Bench, job: Job, count: int) -> Tally:
    return changed_input(bench, job, count, delete=True)


def two_runs(bench: Bench, job: Job, count: int) -> Tally:
    """Either run may win: the other one is refused, and one result remains."""
    tally, moments = Tally(job.name, "two runs"), random.Random(job.name)
    for _ in range(count):
        with box_of(bench) as box:
            children = []
            for _ in range(2):
                children.append(started(lambda: job.run(bench.models, box / "out", False)))
                time.sleep(moments.uniform(0, bench.seconds[job.name] / 3))
            statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
            tally.count, tally.hit = tally.count + 1, tally.hit + (statuses == [0, 1])
            if statuses != [0, 1]:
                tally.losses.append(f"the runs ended with {statuses}")
            judge(tally, bench, job, box)
    return tally


FAULTS: dict[str, Callable[[Bench, Job, int], Tally]] = {
    "kill": kill,
    "terminate": terminate,
    "kill at a call": kill_at_call,
    "full disk": full_disk,
    "small disk": small_disk,
    "file size limit": file_limit,
    "read-only": read_only,
    "input rewritten": input_rewritten,
    "input deleted": input_deleted,
    "two runs": two_runs,
}


def faults_of(job: Job) -> dict[str, Callable[[Bench, Job, int], Tally]]:
    """The faults that a job is disturbed by."""
    return {name: fault for name, fault in FAULTS.items() if not job.is_long or fault in (kill, terminate)}


def with_earlier(tallies: list[Tally], file: Path) -> list[Tally]:
    """These rows and those of an earlier file for other jobs and faults, in the order of `JOBS` and then of time."""
    new = {(tally.job, tally.fault) for tally in tallies}
    earlier = [Tally(**row) for row in json.loads(file.read_text())]
    kept = [tally for tally in earlier if (tally.job, tally.fault) not in new]
    return sorted(kept + tallies, key=lambda tally: list(JOBS).index(tally.job))


def table_of(tallies: list[Tally]) -> str:
    lines = ["| job | fault | runs | ended by it | losses |", "|---|---|---:|---:|---:|"]
    lines += [f"| {t.job} | {t.fault} | {t.count} | {t.hit} | {len(t.losses)} |" for t in tallies if t.count]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What faults do to a job.")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.md and OUT.json")
    parser.add_argument("--count", type=int, default=20, help="disturbed runs per job and fault (default: 20)")
    parser.add_argument("--calls", type=int, default=60, help="calls that a kill is aimed at (default: 60)")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS), help="default: all")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS), help="default: all")
    parser.add_argument("--keep", action="store_true", help="keep the rows of OUT.json for all other jobs and faults")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for job in (JOBS[name] for name in options.jobs):
            bench.prepare(job)
            for name, fault in faults_of(job).items():
                if name not in options.faults:
                    continue
                tallies.append(fault(bench, job, options.calls if name == "kill at a call" else options.count))
                print(table_of(tallies[-1:]).splitlines()[-1], *tallies[-1].losses, sep="\n  ", flush=True)
    if options.keep:
        tallies = with_earlier(tallies, options.out.with_suffix(".json"))
    losses = sum(len(tally.losses) for tally in tallies)
    text = (
        "# Faults\n\n"
        "`python -m benchmarks.faults --out benchmarks/results/faults` disturbs each job on tiny models and\n"
        "runs it again. A loss is a folder that is neither absent, nor the old result, nor that of an undisturbed\n"
        "run; a second run with other bytes; or anything left beside the folder. `ended by it` counts the runs that\n"
        "the fault ended; the others were over before.\n\n"
        f"{table_of(tallies)}\n\n"
        f"{sum(tally.count for tally in tallies)} disturbed runs, {losses} losses.\n"
    )
    write_text(options.out.with_suffix(".md"), text)
    write_text(options.out.with_suffix(".json"), json.dumps([vars(tally) for tally in tallies], indent=2) + "\n")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
