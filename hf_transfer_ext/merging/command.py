"""`hf-transfer-ext merge CONFIG.yml OUT_DIR`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from hf_transfer_ext.files import require_free_space
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication
from hf_transfer_ext.merging.foreign import MERGE_FLAGS
from hf_transfer_ext.merging.planning.config import load_config
from hf_transfer_ext.merging.run import MergeReport, merge
from hf_transfer_ext.settings import QUIET, arguments_for
from hf_transfer_ext.weights.opened import open_model
from hf_transfer_ext.weights.ranks import is_first_rank


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_for(
        merge,
        argv,
        program="hf-transfer-ext merge",
        about="Merge models according to a YAML configuration (in mergekit's format). A merge that was killed resumes "
        "when the same command is run again.",
        hidden=["progress", "alone"],
        extra=[QUIET, *PUSH_OPTIONS],
        foreign=MERGE_FLAGS,
    )
    quiet, dry_run = arguments.pop("quiet", False), arguments.get("dry_run", False)
    publication = Publication.taken_from(arguments)
    report = merge(**arguments, progress=not quiet and not dry_run)
    if not is_first_rank():
        return 0
    print(summary(report))
    if dry_run:
        print(time_floor(report, arguments["config"], allow_pickle=arguments.get("allow_pickle", False)))
        require_free_space(report.folder, report.written_bytes)
    elif not quiet:
        speed = (report.read_bytes + report.written_bytes) / 1e9 / report.seconds
        resumed = f", {report.resumed_tensors} of them from an earlier run" if report.resumed_tensors else ""
        if report.adapter is not None:
            lost = f"{report.adapter.residual_energy:.2%} of the update's energy is lost"
            print(f"LoRA of rank {report.adapter.rank} on {len(report.adapter.modules)} modules; {lost}")
        print(f"{report.tensors} tensors{resumed} in {report.seconds:.1f} s, {speed:.2f} GB/s read and written")
    publication.publish(report.folder)
    return 0


def summary(report: MergeReport) -> str:
    """A summary of the plan in a few lines."""
    lines = [f"{report.method} -> {report.folder}"]
    lines += [f"  {model}" for model in report.models]
    lines.append(
        f"{report.tensors} tensors, {report.parameters / 1e6:.1f} M parameters, "
        f"{report.read_bytes / 1e9:.2f} GB to read, {report.written_bytes / 1e9:.2f} GB to write"
    )
    return "\n".join(lines)


def time_floor(report: MergeReport, config: str, *, allow_pickle: bool = False) -> str:
    """A lower bound on the time of the merge, from the measured read and write speed of a sample."""
    reference = load_config(config).references[0]
    model = open_model(reference, allow_pickle=allow_pickle)
    try:
        read = _read_speed(model.files[0])
    finally:
        model.close()
    write = _write_speed(Path(report.folder).absolute())
    seconds = report.read_bytes / read + report.written_bytes / write
    return (
        f"at {read / 1e9:.2f} GB/s read and {write / 1e9:.2f} GB/s write (a sample, with caching), a merge "
        f"takes at least {seconds:.1f} s"
    )


def _read_speed(file: Path, limit: int = 1 << 28) -> float:
    began, count = time.perf_counter(), 0
    buffer = bytearray(1 << 22)
    with open(file, "rb", buffering=0) as stream:
        while count < limit and (got := stream.readinto(buffer)):
            count += got
    return count / (time.perf_counter() - began)


def _write_speed(target: Path, size: int = 1 << 26) -> float:
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    sample = folder / f".speed.partial-{os.getpid()}"
    block = bytes(1 << 22)
    try:
        began = time.perf_counter()
        with open(sample, "wb", buffering=0) as stream:
            for _ in range(size // len(block)):
                stream.write(block)
        return size / (time.perf_counter() - began)
    finally:
        sample.unlink(missing_ok=True)
