"""Time, CPU and memory of merges, ours compared with mergekit's, on models of real shapes with random weights.

    HF_TRANSFER_EXT_MERGEKIT_PYTHON=/path/to/python python -m benchmarks.merging --shapes qwen2-0.5b \
        --methods linear ties della --out benchmarks/results/merging

makes a base and three fine-tunes in bf16 in a temporary folder, and runs the same YAML by `hf-transfer-ext merge` and
by `mergekit-yaml`, the latter with the interpreter of an environment that has mergekit 0.1.5. Each run is a process of
its own, imports and planning included; wall is the parent's clock, CPU and peak RSS are those that the kernel reports
for the child (`wait4`). The *floor* reads the bytes of the inputs and writes those of the result, in pieces of 8 MB by
as many threads as the merge has, and computes nothing.

`warm` runs find the inputs in the page cache; before `cold` ones they are dropped from it (`posix_fadvise`), and both
the merge and the floor end with an fsync of the result that the measurement waits for. Times depend on the machine and
its other work; the ratios, taken within one sitting, much less. Weights are normal with standard deviation 0.02, the
changes of the fine-tunes with 0.001, so that about 6 % of the changes are lost in bf16, as in real fine-tunes.

The shapes of 70B exist as sparse files, whose holes read as zeros without a disk: `llama-70b` is planned only
(`--dry-run`; that the disk may have no room for the result does not count as a failure), and of `llama-70b-part`, its
embeddings, head and 5 of its 80 layers, a merge is measured for its memory. Zeros are no weights, so these times say
little: nothing waits for a disk, and each selection ends in its first bracket.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from hf_transfer_ext.files import write_text
from hf_transfer_ext.weights.checkpoints import CheckpointWriter, TensorSpec
from hf_transfer_ext.weights.dtypes import BF16

Record = dict[str, Any]

VARIABLE = "HF_TRANSFER_EXT_MERGEKIT_PYTHON"

ENGINES = ["floor", "ours", "mergekit"]
#: Stand for mergekit, which does not have them, in the methods that decompose or multiply whole matrices.
DECOMPOSITION = "svd"
PRODUCTS = "products"


class Shape(NamedTuple):
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    qkv_bias: bool


SHAPES = {
    "qwen2-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 151_936, True, True),
    "llama-1.1b": Shape("llama", 2048, 5632, 22, 32, 4, 32_000, False, False),
    "llama-70b": Shape("llama", 8192, 28_672, 80, 64, 8, 128_256, False, False),
    "llama-70b-part": Shape("llama", 8192, 28_672, 5, 64, 8, 128_256, False, False),
    "qwen2-0.5b-part": Shape("qwen2", 896, 4864, 2, 14, 2, 4864, True, True),
    "toy": Shape("qwen2", 64, 160, 2, 4, 2, 1000, True, True),
}

#: Shapes that exist as sparse files, and what is done with them.
SPARSE = {"llama-70b": "dry run", "llama-70b-part": "sparse"}

#: method -> options of each model, options of the merge; slerp has two models.
METHODS: dict[str, tuple[Record, Record]] = {
    "linear": ({"weight": 0.4}, {}),
    "slerp": ({}, {"t": 0.4}),
    "task_arithmetic": ({"weight": 0.4}, {}),
    "model_stock": ({}, {}),
    "dare_linear": ({"weight": 0.4, "density": 0.5}, {}),
    "dare_ties": ({"weight": 0.4, "density": 0.5}, {}),
    "ties": ({"weight": 0.4, "density": 0.5}, {}),
    "breadcrumbs": ({"weight": 0.4, "density": 0.5}, {}),
    "della": ({"weight": 0.4, "density": 0.5}, {}),
    "sce": ({}, {"select_topk": 0.1}),
    "karcher": ({}, {}),
    "tsv": ({}, {}),
    "iso_c": ({}, {}),
    "iso_cts": ({}, {}),
    "knots": ({"weight": 0.4}, {}),
    "wudi": ({}, {"iterations": 30}),
}

#: What the wall time of mergekit divided by ours is to reach.
TARGETS = {
    "linear": 3,
    "task_arithmetic": 3,
    "slerp": 4,
    "dare_linear": 10,
    "ties": 20,
    "sce": 20,
    "breadcrumbs": 30,
    "della": 30,
}

#: What our wall time divided by that of the floor is not to exceed in warm merges of qwen2-0.5b.
FLOOR_TARGETS = {
    "linear": 2, "task_arithmetic": 2, "slerp": 2, "dare_linear": 2,
    "ties": 4, "sce": 4, "breadcrumbs": 4, "della": 6,
}  # fmt: skip

#: Methods on whole matrices: what our wall time divided by one SVD of each matrix is not to exceed. tsv decomposes
#: three changes and two bases, iso_cts a sum, three changes and two bases, knots one matrix three times as wide.
SVD_TARGETS = {"iso_c": 1.5, "tsv": 5, "iso_cts": 6, "knots": 4}

#: Methods with steps of an optimizer: what our wall time divided by that of their matrix products is not to exceed.
PRODUCT_TARGETS = {"wudi": 1.3}


def specs_of(shape: Shape) -> list[TensorSpec]:
    head = shape.hidden // shape.heads
    sizes = {
        "self_attn.q_proj": (shape.heads * head, shape.hidden),
        "self_attn.k_proj": (shape.kv_heads * head, shape.hidden),
        "self_attn.v_proj": (shape.kv_heads * head, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.heads * head),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        for name, size in sizes.items():
            named[f"model.layers.{i}.{name}.weight"] = size
            if shape.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                named[f"model.layers.{i}.{name}.bias"] = size[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            named[f"model.layers.{i}.{name}.weight"] = (shape.hidden,)
    named["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        named["lm_head.weight"] = (shape.vocab, shape.hidden)
    return [TensorSpec(name, BF16, size) for name, size in named.items()]


def make_models(folder: Path, shape: Shape, tuned: int = 3, *, sparse: bool = False) -> list[Path]:
    """Write a base and fine-tunes, of random numbers or of holes; return their folders, the base first."""
    folders = [folder / "base", *(folder / f"tuned{i}" for i in range(tuned))]
    specs = specs_of(shape)
    if all((path / "config.json").exists() for path in folders):
        return folders  # by an earlier run with the same --models
    for path in folders:
        path.mkdir(parents=True)
    if sparse:
        for path in folders:
            _write_holes(path, specs)
    else:
        _write_random(folders, specs)
    config = {
        "architectures": ["Qwen2ForCausalLM" if shape.model_type == "qwen2" else "LlamaForCausalLM"],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
    }
    for path in folders:
        write_text(path / "config.json", json.dumps(config))
    return folders


def _write_holes(folder: Path, specs: Sequence[TensorSpec]) -> None:
    header, end = {}, 0
    for spec in specs:
        header[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _write_random(folders: Sequence[Path], specs: Sequence[TensorSpec]) -> None:
    writers = [CheckpointWriter(path, specs) for path in folders]
    random = np.random.Generator(np.random.SFC64(0))
    for spec in specs:
        for start in range(0, spec.numel, 1 << 22):
            count = min(1 << 22, spec.numel - start)
            base = torch.from_numpy(random.standard_normal(count, dtype=np.float32)) * 0.02
            writers[0].write(spec.name, start, base.bfloat16())
            for writer in writers[1:]:
                change = torch.from_numpy(random.standard_normal(count, dtype=np.float32)) * 0.001
                writer.write(spec.name, start, (base + change).bfloat16())
    for writer in writers:
        writer.close()


def configuration(method: str, folders: Sequence[Path]) -> Record:
    own, shared = METHODS[method]
    base, *tuned = map(str, folders)
    models: list[Record]
    if method == "slerp":
        models = [{"model": base}, {"model": tuned[0]}]
    else:
        models = [{"model": path, "parameters": dict(own)} for path in tuned]
    config: Record = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method not in ("linear", "karcher"):
        config["base_model"] = base
    return {**config, "parameters": dict(shared)} if shared else config


def run_engine(
    engine: str, config: Path, out: Path, threads: int, timeout_s: float, *, dry_run: bool = False
) -> Record:
    """Run one merge in a child process; returns wall and CPU seconds and peak resident bytes."""
    if engine in (DECOMPOSITION, PRODUCTS):
        command = [sys.executable, "-c", "import sys; from benchmarks.merging import alone; alone(*sys.argv[1:])"]
        command += [engine, str(config)]
    elif engine == "ours":
        command = [sys.executable, "-m", "hf_transfer_ext.cli", "merge", str(config), str(out), "--quiet"]
        command += ["--threads", str(threads), *(["--dry-run"] if dry_run else [])]
    else:
        start = "from mergekit.scripts.run_yaml import main; main()"
        command = [os.environ[VARIABLE], "-c", start, str(config), str(out)]
    record = run_command(command, threads, timeout_s)
    if dry_run and "a merge takes at least" in record.get("output", ""):
        record["status"] = "ok"
        del record["output"]
    return record


def run_command(command: Sequence[str], threads: int, timeout_s: float) -> Record:
    """Run a command in a process of its own: status, wall and CPU seconds, and peak resident bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled already
    started = [sys.executable, "-S", "-c", _LAUNCHER, str(timeout_s), *command]
    done = subprocess.run(started, env=environment, capture_output=True, text=True)
    record: Record = json.loads(done.stdout.splitlines()[-1])
    if record["status"] != "ok":
        record["output"] = done.stderr[-2000:]
    return record


def alone(engine: str, config: str) -> None:
    """What a method has to do at the least with the summed change of every matrix: one SVD, or all its products."""
    from safetensors import safe_open

    plan = yaml.safe_load(Path(config).read_text())
    paths = [plan["base_model"], *(one["model"] for one in plan["models"])]
    base, *tuned = [safe_open(f"{path}/model.safetensors", framework="pt") for path in paths]
    for name in base.keys():
        if len(base.get_slice(name).get_shape()) == 2:
            start = base.get_tensor(name).float()
            total = sum(one.get_tensor(name).float() - start for one in tuned)
            if engine == DECOMPOSITION:
                torch.linalg.svd(total, full_matrices=False)
                continue
            gram = total.T @ total
            for _ in range(plan["parameters"]["iterations"]):
                total @ gram


#: Starts a command and waits for it. A child inherits its parent's peak of resident memory through fork and exec, so
#: the measured command is the child of a process that is small itself.
_LAUNCHER = """
import json, os, signal, sys, time
began = time.perf_counter()
child = os.fork()
if child == 0:
    os.dup2(2, 1)
    os.execvp(sys.argv[2], sys.argv[2:])
signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - began
late = os.WIFSIGNALED(status) and wall >= float(sys.argv[1])
print(json.dumps({
    "status": "ok" if status == 0 else "timed out" if late else "failed",
    "wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024,
}))
"""


def floor(inputs: Sequence[Path], out: Path, threads: int) -> Record:
    """Read the files of the inputs and write as many bytes as the first has."""
    began, cpu = time.perf_counter(), time.process_time()
    out.mkdir(parents=True)
    files = [file for folder in inputs for file in sorted(folder.glob("*.safetensors"))]
    step, size = 8 << 20, files[0].stat().st_size
    target = os.open(out / "model.safetensors", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(target, 0, size)
    local = threading.local()

    def work(task: tuple[Path | None, int]) -> None:
        buffer = local.__dict__.setdefault("buffer", bytearray(step))
        file, start = task
        if file is None:
            os.pwrite(target, memoryview(buffer)[: min(step, size - start)], start)
            return
        descriptor = os.open(file, os.O_RDONLY)
        os.preadv(descriptor, [buffer], start)
        os.close(descriptor)

    tasks: list[tuple[Path | None, int]] = []
    for file in files:
        tasks += [(file, start) for start in range(0, file.stat().st_size, step)]
    tasks += [(None, start) for start in range(0, size, step)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, tasks))
    os.close(target)
    return {"status": "ok", "wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def drop_from_cache(folders: Sequence[Path]) -> None:
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fsync_all(folder: Path) -> float:
    began = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def measurements(arguments: argparse.Namespace, work: Path) -> Iterator[Record]:
    for shape in arguments.shapes:
        models = (arguments.models or work) / shape
        folders = make_models(models, SHAPES[shape], sparse=shape in SPARSE)
        drop_from_cache(folders)  # the pages are clean from here on
        for method in arguments.methods:
            config = configuration(method, folders)
            path = work / "config.yml"
            path.write_text(yaml.safe_dump(config))
            used = [Path(p) for p in {str(one["model"]) for one in config["models"]} | {config.get("base_model")} if p]
            read = sum(file.stat().st_size for folder in used for file in folder.glob("*.safetensors"))
            for state in [SPARSE[shape]] if shape in SPARSE else arguments.states:
                for round_ in range(arguments.rounds):
                    for engine in engines_of(shape, method, arguments.engines):
                        yield {
                            "shape": shape,
                            "method": method,
                            "state": state,
                            "engine": engine,
                            "round": round_,
                            "read_bytes": read,
                            "threads": arguments.threads,
                            **measured(engine, state, path, used, work / "out", arguments),
                        }
        if arguments.models is None:
            shutil.rmtree(models)


def engines_of(shape: str, method: str, chosen: Sequence[str]) -> list[str]:
    """What is run: holes are merged by ours alone, and methods that mergekit lacks stand beside their SVDs."""
    if shape in SPARSE:
        return ["ours"]
    instead = DECOMPOSITION if method in SVD_TARGETS else PRODUCTS if method in PRODUCT_TARGETS else "mergekit"
    return [instead if engine == "mergekit" else engine for engine in chosen]


def measured(
    engine: str, state: str, config: Path, used: Sequence[Path], out: Path, arguments: argparse.Namespace
) -> Record:
    """One run, with the page cache in the given state before it."""
    shutil.rmtree(out, ignore_errors=True)
    if state == "cold":
        drop_from_cache(used)
    elif state == "warm":
        floor(used, out, arguments.threads)  # fills the page cache
        shutil.rmtree(out)
    if engine == "floor":
        record = floor(used, out, arguments.threads)
    else:
        dry = state == "dry run"
        record = run_engine(engine, config, out, arguments.threads, arguments.timeout_s, dry_run=dry)
    if state == "cold":
        record["wall_s"] += fsync_all(out)
    shutil.rmtree(out, ignore_errors=True)
    return record


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else float("nan")


def key_of(record: Record) -> tuple[str, ...]:
    return record["shape"], record["state"], record["method"], record["engine"]


def rows_of(records: Sequence[Record]) -> list[Record]:
    """One row per shape, state and method: medians over the rounds."""
    keys = dict.fromkeys((r["shape"], r["state"], r["method"]) for r in records)
    rows = []
    for shape, state, method in keys:
        row: Record = {"shape": shape, "state": state, "method": method}
        for engine in (*ENGINES, DECOMPOSITION, PRODUCTS):
            own = [r for r in records if key_of(r) == (shape, state, method, engine) and r["status"] == "ok"]
            if engine == DECOMPOSITION:  # the same for all methods
                own = [r for r in records if (r["shape"], r["state"], r["engine"]) == (shape, state, engine)]
            for value in ("wall_s", "cpu_s", "peak_bytes"):
                row[f"{engine}_{value}"] = median([r[value] for r in own if value in r])
        mine = [r for r in records if key_of(r) == (shape, state, method, "ours")]
        row["late"] = [r["wall_s"] for r in mine if r["status"] == "timed out"]
        row["speedup"] = row["mergekit_wall_s"] / row["ours_wall_s"]
        row["memory"] = row["mergekit_peak_bytes"] / row["ours_peak_bytes"]
        row["target"] = TARGETS.get(method)
        sittings = [r.get("sitting") for r in records if key_of(r)[:3] == (shape, state, method)]
        row["paired"] = len(set(sittings)) == 1
        rows.append(row)
    return rows


def markdown(records: Sequence[Record], command: str) -> str:
    threads = records[0]["threads"]
    lines = [
        "# Merging: ours beside mergekit",
        "",
        f"`{command}`",
        "",
        f"{os.cpu_count()} cores ({processor()}), {threads} threads, torch {torch.__version__}. Wall and CPU in "
        "seconds, peak resident memory in MB, imports included; `floor` reads and writes the same bytes and computes "
        "nothing. Resident memory leaves out the page cache, which holds what was read and written and which the "
        "system takes back when it needs it. `warm`: the inputs are in it, and nothing waits for the disk; `cold`: "
        "they are not, and the result is on the disk at the end. `sparse` and `dry run`: files of holes, see the "
        "head of `benchmarks/merging.py`. `*`: measured in different sittings, in which the machine was not equally "
        "fast.",
        "",
        "| shape | state | method | floor | ours wall | ours CPU | ours MB | mergekit wall | mergekit CPU "
        "| mergekit MB | times faster | target | times less memory | times the floor | target |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = rows_of(records)
    for row in rows:
        if row["method"] in (*SVD_TARGETS, *PRODUCT_TARGETS):
            continue
        numbers = [
            f"{row['floor_wall_s']:.2f}",
            f"{row['ours_wall_s']:.2f}",
            f"{row['ours_cpu_s']:.1f}",
            f"{row['ours_peak_bytes'] / 1e6:.0f}",
            f"{row['mergekit_wall_s']:.1f}",
            f"{row['mergekit_cpu_s']:.1f}",
            f"{row['mergekit_peak_bytes'] / 1e6:.0f}",
            f"{row['speedup']:.1f}" + ("" if row["paired"] else "*"),
            str(row["target"] or ""),
            f"{row['memory']:.1f}",
            f"{row['ours_wall_s'] / row['floor_wall_s']:.1f}",
            str(
                FLOOR_TARGETS.get(row["method"], "") if row["shape"] == "qwen2-0.5b" and row["state"] == "warm" else ""
            ),
        ]
        lines.append(f"| {row['shape']} | {row['state']} | {row['method']} | " + " | ".join(numbers) + " |")
    lines += matrix_table([row for row in rows if row["method"] in SVD_TARGETS], DECOMPOSITION)
    lines += matrix_table([row for row in rows if row["method"] in PRODUCT_TARGETS], PRODUCTS)
    return "\n".join(lines).replace("nan", "-") + "\n"


#: What stands above the table of the methods that decompose matrices, and of those that multiply them.
MATRIX_TEXTS = {
    DECOMPOSITION: "Methods that decompose whole matrices; mergekit has none of them. `svd` is one "
    "`torch.linalg.svd` in float32 of the summed change of every matrix, read from the same files, and nothing else; "
    "the merges decompose in float64. Other work on the machine lengthens both: compare within a row.",
    PRODUCTS: "Methods with steps of an optimizer on whole matrices, here 30 of them; mergekit has none. `products` "
    "are the matrix products of these steps, and nothing else. `part`: two layers, and as many tokens as a layer is "
    "wide inside.",
}


def matrix_table(rows: Sequence[Record], least: str) -> list[str]:
    """The methods on whole matrices, beside the least that they have to do: one SVD of each, or their products."""
    if not rows:
        return []
    lines = ["", MATRIX_TEXTS[least], ""]
    lines += [
        f"| shape | state | method | floor | {least} wall | {least} CPU | ours wall | ours CPU | ours MB "
        f"| times the {least} | CPU times the {least} | target |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        names = ("floor_wall_s", f"{least}_wall_s", f"{least}_cpu_s", "ours_wall_s", "ours_cpu_s")
        numbers = [f"{row[name]:.1f}" for name in names]
        if row["late"]:
            numbers[3] = f"over {max(row['late']):.0f}"
        numbers += [f"{row['ours_peak_bytes'] / 1e6:.0f}"]
        numbers += [f"{row[f'ours_{value}'] / row[f'{least}_{value}']:.1f}" for value in ("wall_s", "cpu_s")]
        numbers += [str({**SVD_TARGETS, **PRODUCT_TARGETS}[row["method"]])]
        lines.append(f"| {row['shape']} | {row['state']} | {row['method']} | " + " | ".join(numbers) + " |")
    return lines


def processor() -> str:
    """The name of the CPU, if the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def plot(records: Sequence[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows_of(records) if row["state"] == "warm" and row["mergekit_wall_s"] > 0]
    if not rows:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    names = [
        row["method"] if row["shape"] == rows[0]["shape"] else f"{row['method']} ({row['shape']})" for row in rows
    ]
    places = np.arange(len(rows))
    for axis, value, scale, label in ((left, "wall_s", 1.0, "wall, s"), (right, "peak_bytes", 1e6, "peak RSS, MB")):
        for shift, engine in ((-0.2, "ours"), (0.2, "mergekit")):
            axis.bar(places + shift, [row[f"{engine}_{value}"] / scale for row in rows], 0.4, label=engine)
        if value == "wall_s":
            axis.plot(places, [row["floor_wall_s"] for row in rows], "k_", markersize=18, label="read + write")
        axis.set_yscale("log")
        axis.set_ylabel(label)
        axis.set_xticks(places, names, rotation=40, ha="right")
        axis.legend()
    figure.suptitle(f"Merging, base + 3 fine-tunes in bf16, {rows[0]['shape']}, {os.cpu_count()} cores")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_results(records: Sequence[Record], out: Path, command: str) -> None:
    content = {
        "command": command,
        "versions": {name: version(name) for name in ("torch", "numpy", "hf_transfer_ext")} | {"mergekit": "0.1.5"},
        "cores": os.cpu_count(),
        "records": list(records),
    }
    write_text(out.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    write_text(out.with_suffix(".md"), markdown(records, command))
    plot(records, out.with_suffix(".png"))


def without_folders(argv: Sequence[str]) -> list[str]:
    """The arguments that affect what is measured."""
    local = {i + shift for i, word in enumerate(argv) if word in ("--models", "--work") for shift in (0, 1)}
    return [word for i, word in enumerate(argv) if i not in local]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2-0.5b"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(TARGETS))
    parser.add_argument("--states", nargs="+", choices=["warm", "cold"], default=["warm"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="time limit of one merge")
    parser.add_argument("--work", type=Path, help="folder for the models (default: a temporary one)")
    parser.add_argument("--models", type=Path, help="folder to keep the models in, for the next run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merging"))
    parser.add_argument("--append", action="store_true", help="keep other records in OUT.json")
    arguments = parser.parse_args(argv)
    compared = set(arguments.methods) - set(SVD_TARGETS) - set(PRODUCT_TARGETS)
    if "mergekit" in arguments.engines and compared and not os.environ.get(VARIABLE):
        parser.error(f"mergekit needs {VARIABLE}, the interpreter of an environment with mergekit 0.1.5")
    command = "python -m benchmarks.merging " + " ".join(without_folders(sys.argv[1:] if argv is None else argv))
    records: list[Record] = []
    if arguments.append and arguments.out.with_suffix(".json").exists():
        earlier = json.loads(arguments.out.with_suffix(".json").read_text())
        records, command = earlier["records"], earlier["command"] + "`, `" + command
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        before = list(records)
        sitting = time.strftime("%Y-%m-%d %H:%M")
        for record in measurements(arguments, Path(folder)):
            record["sitting"] = sitting
            records = [one for one in records if one not in before or key_of(one) != key_of(record)] + [record]
            print(
                f"{record['shape']} {record['method']} {record['state']} {record['engine']}: {record['status']}, "
                f"{record['wall_s']:.2f} s, CPU {record.get('cpu_s', 0):.1f} s, "
                f"{record.get('peak_bytes', 0) / 1e6:.0f} MB",
                flush=True,
            )
            write_results(records, arguments.out, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
