"""Extraction beside mergekit's, and resizing beside the SVD of the dense change.

    HF_TRANSFER_EXT_MERGEKIT_PYTHON=/path/to/python python -m benchmarks.adapters --out benchmarks/results/adapters

*Extraction*: a LoRA of the linear layers from a base and a fine-tune of random weights in a real model's shapes, in
bf16, by `hf-transfer-ext extract` and by `mergekit-extract-lora` in the environment of the variable. Each run is a
process of its own, imports included: its wall and CPU seconds and its peak of resident memory. The *residual* is the
share of the squared norm of the changes that the adapter does not hold. Random changes have a flat spectrum, which is
the worst case for a random sketch.

*Resizing*: the factors of an adapter with these shapes, cut to a smaller rank, by QR and a small core, and by a full
SVD of B A; both in memory, on some of the layers. The *difference* is relative, on the smallest matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.merging import SHAPES, VARIABLE, make_models, run_command, specs_of
from hf_transfer_ext.files import write_text
from hf_transfer_ext.weights.lora import CONVERTIBLE, LoraFactors, decomposed, read_lora
from hf_transfer_ext.weights.opened import InputModel, Scratch, open_model
from hf_transfer_ext.weights.reference import parse_reference

Record = dict[str, Any]
ENGINES = ("ours", "mergekit")
RESIZE = ("ours", "dense SVD")


def extraction(engine: str, folders: Sequence[Path], out: Path, rank: int) -> list[str]:
    """The command that extracts the linear layers."""
    base, tuned = map(str, folders)
    if engine == "ours":
        words = ["extract", base, tuned, str(out), "--rank", str(rank), "--quiet"]
        return [sys.executable, "-m", "hf_transfer_ext.cli", *words]
    start = "from mergekit.scripts.extract_lora import main; main()"
    words = ["--model", tuned, "--base-model", base, "--out-path", str(out), "--max-rank", str(rank)]
    words += ["-e", "embed_tokens", "-e", "lm_head", "--skip-undecomposable", "--no-copy-tokenizer", "--quiet"]
    return [os.environ[VARIABLE], "-c", start, *words, "--no-write-model-card"]


def residual(folders: Sequence[Path], adapter: Path) -> tuple[float, int]:
    """Share of the squared norm of the linear layers' changes that an adapter does not hold, and its modules."""
    base, tuned = (open_model(parse_reference(folder, "model")) for folder in folders)
    found = read_lora(adapter, allow=CONVERTIBLE)  # mergekit stores changed biases beside the factors
    try:
        lost = whole = 0.0
        for module, factors in found.modules.items():
            change = _read(tuned, f"{module}.weight") - _read(base, f"{module}.weight")
            lost += float((change - factors.left @ factors.right).double().square().sum())
            whole += float(change.double().square().sum())
        return lost / whole, len(found.modules)
    finally:
        found.checkpoint.close()
        base.close()
        tuned.close()


def _read(model: InputModel, name: str) -> torch.Tensor:
    tensor = model[name]
    values = torch.empty(tensor.shape)
    tensor.read(0, values.view(-1), Scratch())
    return values


def resize_step(
    method: str, shape: str, rank: int, new_rank: int, layers: int, threads: int = 1
) -> Callable[[], Record]:
    """Cut the factors of the linear layers of `layers` layers; the step says how far its result is from the other."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    sizes = [
        spec.shape
        for spec in specs_of(SHAPES[shape])
        if "_proj.weight" in spec.name and int(spec.name.split(".")[2]) < layers
    ]
    factors = [
        LoraFactors(
            torch.randn(rows, rank, generator=generator) / rank**0.5, torch.randn(rank, columns, generator=generator)
        )
        for rows, columns in sizes
    ]
    cut = _by_core if method == "ours" else _by_dense_svd

    def step() -> Record:
        began = time.perf_counter()
        found = [cut(one, new_rank) for one in factors]
        seconds = time.perf_counter() - began
        # Compared with the other method on the smallest matrix, after the clock has stopped.
        i = min(range(len(sizes)), key=lambda i: sizes[i][0] * sizes[i][1])
        other = (_by_dense_svd if method == "ours" else _by_core)(factors[i], new_rank)
        product, expected = (one.left @ one.right for one in (found[i], other))
        return {"step_s": seconds, "difference": float((product - expected).norm() / expected.norm())}

    return step


def _by_core(factors: LoraFactors, rank: int) -> LoraFactors:
    left, values, right = decomposed(factors)
    root = values[:rank].sqrt()
    return LoraFactors((left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float())


def _by_dense_svd(factors: LoraFactors, rank: int) -> LoraFactors:
    left, values, right = torch.linalg.svd(factors.left @ factors.right, full_matrices=False)
    root = values[:rank].sqrt()
    return LoraFactors(left[:, :rank] * root, root[:, None] * right[:rank])


def extractions(arguments: argparse.Namespace, work: Path) -> Iterator[Record]:
    folders = make_models(work / arguments.shape, SHAPES[arguments.shape], tuned=1)
    for number in range(arguments.rounds):
        for engine in arguments.engines:
            out = work / f"{engine}-{number}"
            command = extraction(engine, folders, out, arguments.rank)
            record = {"job": "extract", "engine": engine, "round": number}
            record |= run_command(command, arguments.threads, arguments.timeout_s)
            if record["status"] == "ok":
                record["residual"], record["modules"] = residual(folders, out)
            yield record


def resizings(arguments: argparse.Namespace) -> Iterator[Record]:
    sizes = {"shape": arguments.shape, "rank": arguments.resize[0], "new_rank": arguments.resize[1]}
    for number, method in measure.rounds_of(RESIZE, arguments.rounds):
        given = {"method": method, **sizes, "layers": arguments.layers, "threads": arguments.threads}
        found = measure.measure_in_child(
            "benchmarks.adapters:resize_step", given, limit_bytes=measure.memory_limit(), threads=arguments.threads,
            timeout_s=arguments.timeout_s,
        )  # fmt: skip
        yield {"job": "resize", "engine": method, "round": number, **found}


def _median(records: Sequence[Record], job: str, engine: str, name: str) -> float | None:
    found = [
        one[name] for one in records if one["job"] == job and one["engine"] == engine and one["status"] == measure.OK
    ]
    return statistics.median(found) if found else None


def _ratio(one: float | None, other: float | None) -> str | None:
    return None if one is None or not other else f"{one / other:.1f}"


def markdown(records: Sequence[Record], arguments: argparse.Namespace, command: str) -> str:
    """The tables. Numbers are medians over the rounds."""

    def column(job: str, engine: str, name: str, form: str, factor: float = 1.0) -> str | None:
        value = _median(records, job, engine, name)
        return None if value is None else format(factor * value, form)

    def ratio(job: str, engines: Sequence[str], name: str) -> str | None:
        return _ratio(*(_median(records, job, engine, name) for engine in engines))

    parts = [f"# Adapters: extraction and resizing\n\n`{command}`\n"]
    machine = measure.machine(["torch"])
    parts.append(
        f"{machine['processor']}, {arguments.threads} threads, torch {machine['versions']['torch']}; medians of "
        f"{arguments.rounds} rounds. Shapes of {arguments.shape}, random weights (see the head of "
        f"`benchmarks/adapters.py`). Other work on the machine lengthens wall seconds more than CPU seconds.\n\n"
        f"## Extraction at rank {arguments.rank}\n"
    )
    names = (("wall s", "wall_s", ".1f", 1.0), ("CPU s", "cpu_s", ".1f", 1.0), ("peak MB", "peak_bytes", ".0f", 1e-6))
    rows = [[title, *(column("extract", one, key, form, by) for one in ENGINES)] for title, key, form, by in names]
    rows = [[*row, ratio("extract", ENGINES[::-1], key)] for row, (_, key, _, _) in zip(rows, names, strict=True)]
    residuals = [column("extract", one, "residual", ".5f") for one in ENGINES]
    rows.append(["residual", *residuals, ratio("extract", ENGINES[::-1], "residual")])
    rows.append(["modules", *(column("extract", one, "modules", ".0f") for one in ENGINES), None])
    parts.append(measure.markdown_table(["", "ours", "mergekit-extract-lora", "theirs / ours"], rows))
    parts.append(f"## Resizing from rank {arguments.resize[0]} to {arguments.resize[1]}, {arguments.layers} layers\n")
    rows = [
        [
            "seconds",
            *(column("resize", one, "step_s", ".3f") for one in RESIZE),
            ratio("resize", RESIZE[::-1], "step_s"),
        ],
        ["relative difference", column("resize", "ours", "difference", ".1e"), None, None],
    ]
    parts.append(measure.markdown_table(["", "ours", "SVD of the dense change", "theirs / ours"], rows))
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rank", type=int, default=32, help="of the extracted adapter")
    parser.add_argument("--resize", type=int, nargs=2, default=[64, 16], metavar=("FROM", "TO"))
    parser.add_argument("--layers", type=int, default=1, help="layers that are resized")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout-s", type=float, default=1200.0, help="time limit of one run")
    parser.add_argument("--work", type=Path, help="folder for the models (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters"))
    arguments = parser.parse_args(argv)
    if "mergekit" in arguments.engines and not os.environ.get(VARIABLE):
        parser.error(f"mergekit needs {VARIABLE}, the interpreter of an environment with mergekit 0.1.5")
    command = f"python -m benchmarks.adapters --shape {arguments.shape} --rank {arguments.rank}"
    command += f" --rounds {arguments.rounds} --threads {arguments.threads}"
    records: list[Record] = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for found in (extractions(arguments, Path(folder)), resizings(arguments)):
            for record in found:
                records.append(record)
                print(json.dumps({key: value for key, value in record.items() if key != "output"}), flush=True)
                content = {"command": command, "machine": measure.machine(["torch"]), "records": records}
                measure.write_json(arguments.out.with_suffix(".json"), content)
                write_text(arguments.out.with_suffix(".md"), markdown(records, arguments, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
