"""`hf-transfer-ext merge CONFIG.yml OUT_DIR`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

from hf_transfer_ext.files import require_free_space
from hf_transfer_ext.merging.planning.config import load_config
from hf_transfer_ext.merging.run import MergeReport, merge
from hf_transfer_ext.weights.checkpoints import MAX_SHARD_BYTES
from hf_transfer_ext.weights.opened import open_model
from hf_transfer_ext.weights.ranks import is_first_rank


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-transfer-ext merge",
        description="Merge models as a YAML configuration says (the grammar of mergekit). A merge that was killed "
        "goes on where it stopped when the same command is given again.",
    )
    add_common_arguments(parser)
    parser.add_argument("--lora-rank", type=int, help="write a LoRA of this rank on the base model, not a model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the least time; write nothing")
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinity in the inputs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes that makes a model folder of a configuration."""
    parser.add_argument("config", help="YAML configuration")
    parser.add_argument("out_dir", help="folder of the result")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in OUT_DIR")
    parser.add_argument("--threads", type=int, help="tensors worked on at once (default: all cores)")
    size = MAX_SHARD_BYTES / 1e9
    parser.add_argument(
        "--max-shard-gb", type=_shard_size, default=size, help=f"largest file, in 10^9 bytes (default: {size:g})"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="accept pytorch_model.bin (weights_only)")


def _shard_size(text: str) -> float:
    size = float(text)
    if not 1e-9 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"has to be a number of 10^9 bytes above 0, got {text}")
    return size


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    report = merge(
        arguments.config,
        arguments.out_dir,
        overwrite=arguments.overwrite,
        threads=arguments.threads,
        device=arguments.device,
        lora_rank=arguments.lora_rank,
        dry_run=arguments.dry_run,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        allow_pickle=arguments.allow_pickle,
        allow_nonfinite=arguments.allow_nonfinite,
        progress=not arguments.quiet and not arguments.dry_run,
    )
    if not is_first_rank():
        return 0
    print(summary(report))
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.dry_run:
        print(time_floor(report, arguments.config, allow_pickle=arguments.allow_pickle))
        require_free_space(report.folder, report.written_bytes)
    elif not arguments.quiet:
        speed = (report.read_bytes + report.written_bytes) / 1e9 / report.seconds
        resumed = f", {report.resumed_tensors} of them by an earlier run" if report.resumed_tensors else ""
        if report.adapter is not None:
            lost = f"{report.adapter.residual_energy:.2%} of the change's energy is left out"
            print(f"LoRA of rank {report.adapter.rank} on {len(report.adapter.modules)} modules; {lost}")
        print(f"{report.tensors} tensors{resumed} in {report.seconds:.1f} s, {speed:.2f} GB/s read and written")
    return 0


def summary(report: MergeReport) -> str:
    """The plan in a few lines."""
    lines = [f"{report.method} -> {report.folder}"]
    lines += [f"  {model}" for model in report.models]
    lines.append(
        f"{report.tensors} tensors, {report.parameters / 1e6:.1f} M parameters, "
        f"{report.read_bytes / 1e9:.2f} GB to read, {report.written_bytes / 1e9:.2f} GB to write"
    )
    return "\n".join(lines)


def time_floor(report: MergeReport, config: str, *, allow_pickle: bool = False) -> str:
    """The least time of the merge: its bytes at the speed at which this machine reads and writes a sample of them."""
    reference = load_config(config).references[0]
    model = open_model(reference, allow_pickle=allow_pickle)
    try:
        read = _read_speed(model.files[0])
    finally:
        model.close()
    write = _write_speed(Path(report.folder).absolute())
    seconds = report.read_bytes / read + report.written_bytes / write
    return (
        f"at {read / 1e9:.2f} GB/s read and {write / 1e9:.2f} GB/s write (a sample, with what is cached) no merge can "
        f"take less than {seconds:.1f} s"
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
