"""Time and peak memory of distillation losses, from hidden states to gradients, the trainable lm_head included.

    python -m benchmarks.kd_loss --shapes qwen2.5-0.5b --dtypes float32 --rounds 3 --out benchmarks/results/kd_loss

measures our `fused_divergence` on a CPU, and with `--device cuda` on a GPU, beside

- *ours rounded*: the same with `float32_logits=False`, in bfloat16, where the peers round logits, too;
- *trl full*: the full-logit loss of TRL's GKD trainer (`GKDTrainer.generalized_jsd_loss`) with the two projections;
  all tokens count and no labels are given, which spares it the masked copy that its trainer makes;
- *trl chunked*: the tiled loss of TRL's stable `DistillationTrainer`;
- *liger chunked*: Liger's `LigerFusedLinearJSDLoss`, on a GPU with its default of `torch.compile`, on a CPU without;
- *liger triton*: Liger's kernels for a GPU, `LigerFusedLinearJSD`;
- *products*: the four matrix products alone that any of them needs (two projections, the gradients of hidden states
  and head), in whole-batch tiles: the floor in time. It computes no loss.

One measurement is one forward and backward of all tokens in a process of its own (`benchmarks/measure.py` says what is
measured); the methods take turns within each round, and ratios are taken within a round. Times depend on the machine
and its other work, their ratios much less. Before anything is timed, every method must give the same loss and the
same gradients on a small input as the plain formula on float32 logits; its relative errors are part of the table.

Inputs look like language, because some divergences care: the teacher's logits are a Zipf prior over the vocabulary,
-log(rank + 2.7), plus a term that differs from token to token with standard deviation 5. On 152k tokens that gives a
mean entropy of 3.2 nats, .36 for the likeliest token, and 3 tokens that hold half of the mass. The student is the
teacher with 20 % noise on hidden states and head, .8 nats away. All tensors are filled in place.

Results are added to with `--append`, so that a long table can be made in several sittings; the rounds of each sitting
are paired among themselves.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from hf_transfer_ext.files import write_text
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import fused_divergence
from hf_transfer_ext.losses.rows import HeadRows
from hf_transfer_ext.models.heads import LMHead


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocab: int


SHAPES = {
    "qwen2.5-0.5b": Shape(2048, 896, 151_936),
    "gemma3-270m": Shape(2048, 640, 262_144),
    "qwen2.5-0.5b-8k": Shape(8192, 896, 151_936),
    "gemma3-270m-8k": Shape(8192, 640, 262_144),
    "toy": Shape(64, 64, 2_000),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: The divergences that the peers have, under the name and the `beta` that they all give them.
PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "generalized_jsd": 0.5}
#: Largest relative error of loss and gradients on the toy shape with which a method is still timed.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


@dataclass
class Problem:
    """Hidden states and heads of a student and its teacher."""

    hidden: Tensor  # (tokens, hidden)
    head: Tensor  # (vocab, hidden)
    teacher_hidden: Tensor
    teacher_head: Tensor

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]


def problem(shape: Shape, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Problem:
    """Zipf-like teacher and a student near it, see above; filled in place, without a transient copy."""
    generator = torch.Generator(device).manual_seed(seed)
    spread, noise = 5.0, 0.2

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    teacher_hidden = normal(shape.tokens, shape.hidden)
    teacher_head = normal(shape.vocab, shape.hidden).mul_(spread / math.sqrt(shape.hidden))
    hidden = normal(shape.tokens, shape.hidden).mul_(noise).add_(teacher_hidden)
    head = normal(shape.vocab, shape.hidden).mul_(noise * spread / math.sqrt(shape.hidden)).add_(teacher_head)
    # One hidden unit is always on and carries the prior.
    prior = torch.arange(1, shape.vocab + 1, device=device).add(2.7).log_().neg_().to(dtype)
    for states, weight in ((teacher_hidden, teacher_head), (hidden, head)):
        states[:, 0] = 1.0
        weight[:, 0] = prior
    return Problem(hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head)


def ours(x: Problem, divergence: str, float32_logits: bool = True) -> Tensor:
    return fused_divergence(
        x.hidden, LMHead(x.head), HeadRows(x.teacher_hidden, LMHead(x.teacher_head)), DISTILLATION_LOSSES[divergence],
        weights=torch.full((x.tokens,), 1 / x.tokens, device=x.hidden.device), float32_logits=float32_logits,
    ).loss  # fmt: skip


def ours_rounded(x: Problem, divergence: str) -> Tensor:
    return ours(x, divergence, float32_logits=False)


def trl_full(x: Problem, divergence: str) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    logits = (x.hidden @ x.head.T)[None]
    with torch.no_grad():
        teacher_logits = (x.teacher_hidden @ x.teacher_head.T)[None]
    return GKDTrainer.generalized_jsd_loss(
        logits, teacher_logits, beta=PEER_BETA[divergence], num_items_in_batch=x.tokens
    )


def trl_chunked(x: Problem, divergence: str) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        x.hidden[None], x.teacher_hidden[None], x.head, x.teacher_head,
        completion_mask=torch.ones(1, x.tokens, device=x.hidden.device), beta=PEER_BETA[divergence],
    )  # fmt: skip
    return loss


def liger_chunked(x: Problem, divergence: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    device = x.hidden.device
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEER_BETA[divergence], compiled=device.type != "cpu"
    )
    labels = torch.zeros(x.tokens, dtype=torch.long, device=device)
    return loss(x.hidden, x.head, x.teacher_hidden, x.teacher_head, labels)


def liger_triton(x: Problem, divergence: str) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(PEER_BETA[divergence])(x.hidden, x.head, x.teacher_hidden, x.teacher_head)


def products(x: Problem) -> tuple[Tensor, Tensor]:
    """The four products on all tokens, one slice of the vocabulary at a time, into reused buffers."""
    rows = 8_192
    with torch.no_grad():
        logits, teacher_logits = x.hidden.new_empty(2, x.tokens, rows)
        d_hidden, d_head = torch.zeros_like(x.hidden), torch.empty_like(x.head)
        for start in range(0, x.head.shape[0], rows):
            part = slice(start, start + rows)
            width = x.head[part].shape[0]
            torch.mm(x.hidden, x.head[part].T, out=logits[:, :width])
            torch.mm(x.teacher_hidden, x.teacher_head[part].T, out=teacher_logits[:, :width])
            d_hidden.addmm_(logits[:, :width], x.head[part])
            torch.mm(logits[:, :width].T, x.hidden, out=d_head[part])
    return d_hidden, d_head


ROUNDED = "ours rounded"
LOSSES: dict[str, Callable[[Problem, str], Tensor]] = {
    "ours": ours,
    ROUNDED: ours_rounded,
    "trl full": trl_full,
    "trl chunked": trl_chunked,
    "liger chunked": liger_chunked,
    "liger triton": liger_triton,
}
GPU_ONLY = ("liger triton",)
FLOOR = "products"
METHODS = [*LOSSES, FLOOR]


def step_of(
    shape: str, dtype: str, method: str, divergence: str, device: str = "cpu"
) -> Callable[[], dict[str, float]]:
    """In the child: warm the libraries up on the toy shape, build the inputs, return the step to measure."""

    def run(x: Problem) -> dict[str, float]:
        if method == FLOOR:
            products(x)
            return {}
        loss = LOSSES[method](x, divergence)
        loss.backward()
        x.hidden.grad = x.head.grad = None
        return {"loss": loss.item()}

    run(problem(SHAPES["toy"], DTYPES[dtype], device=device))
    inputs = problem(SHAPES[shape], DTYPES[dtype], device=device)
    return lambda: run(inputs)


def errors(dtype: str, method: str, divergence: str, device: str = "cpu") -> tuple[float, float]:
    """Relative error of the loss, and of the gradients of hidden states and head (the larger), on the toy shape.

    The reference is the formula, by autograd on full logits, from the same inputs in float32.
    """
    x = problem(SHAPES["toy"], DTYPES[dtype], device=device)
    got = LOSSES[method](x, divergence)
    got_gradients = torch.autograd.grad(got, (x.hidden, x.head))
    exact = [tensor.detach().float() for tensor in (x.hidden, x.head, x.teacher_hidden, x.teacher_head)]
    y = Problem(exact[0].requires_grad_(), exact[1].requires_grad_(), exact[2], exact[3])
    logits, teacher_logits = (y.hidden @ y.head.T)[None], (y.teacher_hidden @ y.teacher_head.T)[None]
    want = DISTILLATION_LOSSES[divergence](logits, teacher_logits).mean()
    want_gradients = torch.autograd.grad(want, (y.hidden, y.head))
    gradient_errors = [
        ((a.float() - b).norm() / b.norm()).item() for a, b in zip(got_gradients, want_gradients, strict=True)
    ]
    return abs(got.item() / want.item() - 1), max(gradient_errors)


def check_agreement(
    dtypes: Sequence[str], methods: Sequence[str], divergences: Sequence[str], device: str = "cpu"
) -> list[dict[str, Any]]:
    """Errors of each (method, divergence) and dtype; `ValueError` where one does not compute the divergence."""
    found = []
    for dtype in dtypes:
        for method, divergence in cases_of(methods, divergences, dtype):
            if method == FLOOR:
                continue
            value, gradient = errors(dtype, method, divergence, device)
            if not max(value, gradient) <= TOLERANCE[dtype]:
                raise ValueError(
                    f"{method} does not compute {divergence} in {dtype}: relative error {value:.2g} in the loss, "
                    f"{gradient:.2g} in the gradient, allowed {TOLERANCE[dtype]:g}. Its times would mean nothing."
                )
            found.append(
                {"dtype": dtype, "method": method, "divergence": divergence, "value": value, "gradient": gradient}
            )
    return found


def cases_of(methods: Sequence[str], divergences: Sequence[str], dtype: str) -> list[tuple[str, str]]:
    """(method, divergence) pairs to run in one round; the floor once, peers only on what they have."""
    own = {"ours"} if dtype == "float32" else {"ours", ROUNDED}
    peers = {*LOSSES} - {"ours", ROUNDED}
    pairs = [(m, d) for d in divergences for m in methods if m in own or (m in peers and d in PEER_BETA)]
    return pairs + [(FLOOR, "")] * (FLOOR in methods)


def summarize(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shape, dtype, divergence and method: medians, and ratios within a round."""
    records, accuracy = result["records"], result["agreement"]

    def select(shape: str, dtype: str, method: str, divergence: str) -> list[dict[str, Any]]:
        key = {"shape": shape, "dtype": dtype, "method": method, "divergence": divergence}
        return [record for record in records if key.items() <= record.items()]

    rows = []
    keys = dict.fromkeys((r["shape"], r["dtype"], r["divergence"], r["method"]) for r in records)
    order = ["", *DISTILLATION_LOSSES]
    for shape, dtype, divergence, method in sorted(
        keys,
        key=lambda k: (list(SHAPES).index(k[0]), list(DTYPES).index(k[1]), order.index(k[2]), METHODS.index(k[3])),
    ):
        mine = select(shape, dtype, method, divergence)
        reference = select(shape, dtype, "ours", divergence)
        floor = select(shape, dtype, FLOOR, "")
        key = {"dtype": dtype, "method": method, "divergence": divergence}
        error = next((e for e in accuracy if key.items() <= e.items()), {})
        bad = [record["status"] for record in mine if record["status"] != measure.OK]
        rows.append(
            {
                "shape": shape,
                "dtype": dtype,
                "divergence": divergence,
                "method": method,
                "rounds": len(mine),
                "status": bad[0] if bad else measure.OK,
                "wall_s": measure.median(mine, "wall_s"),
                "cpu_s": measure.median(mine, "cpu_s"),
                "growth_gb": _gb(measure.median(mine, "growth_bytes")),
                "stopped_at_gb": _gb(max((r.get("seen_bytes", 0) for r in mine), default=0) or None),
                "wall_over_ours": measure.paired_ratio(mine, reference, "wall_s"),
                "cpu_over_ours": measure.paired_ratio(mine, reference, "cpu_s"),
                "growth_over_ours": measure.paired_ratio(mine, reference, "growth_bytes"),
                "cpu_over_floor": measure.paired_ratio(mine, floor, "cpu_s"),
                "wall_over_floor": measure.paired_ratio(mine, floor, "wall_s"),
                "loss_error": error.get("value"),
                "gradient_error": error.get("gradient"),
            }
        )
    return rows


#: Title, field and number format of the columns of the table.
_COLUMNS = [
    ("divergence, method", "", ""), ("rounds", "rounds", "d"), ("wall s", "wall_s", ".4g"), ("CPU s", "cpu_s", ".3g"),
    ("growth GB", "growth_gb", ".2f"), ("growth x ours", "growth_over_ours", ".1f"),
    ("wall x ours", "wall_over_ours", ".2f"), ("CPU x ours", "cpu_over_ours", ".2f"),
    ("CPU x floor", "cpu_over_floor", ".2f"), ("wall x floor", "wall_over_floor", ".2f"),
    ("loss error", "loss_error", ".1e"), ("gradient error", "gradient_error", ".1e"),
]  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The Markdown report of a result: how it was measured, and one table per shape and dtype."""
    rows, made_on = result["rows"], result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in made_on["versions"].items())
    text = [
        "# Distillation losses: time and peak memory\n",
        "Forward and backward from hidden states to the gradients of hidden states and lm_head, one process a "
        "measurement. Medians over the rounds; ratios are medians of the ratios within each round.\n",
        f"{made_on['processor']}, {made_on['threads']} threads of {made_on['cores']} cores, "
        f"{made_on['memory_gb']} GB; Python {made_on['python']}, {versions}.\n",
        "Made by:\n",
        "```",
        *(f"{command}  # x{times}" for command, times in Counter(result["commands"]).items()),
        "```\n",
        "*growth*: peak memory during the step minus that right before it. *x ours*: how many times the figure of our "
        "loss, same divergence. *x floor*: time over that of the four matrix products alone. CPU time counts all "
        "threads and suffers less than wall time where other jobs share the machine. "
        "*errors*: relative, of the loss and of the gradients, against the float32 formula on the toy shape.\n",
    ]
    on_gpu = all(row["cpu_s"] is None for row in rows)
    columns = [name for name, *_ in _COLUMNS if not (on_gpu and "CPU" in name)]
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in rows):
        size = SHAPES[shape]
        text.append(f"## {shape}, {dtype}: {size.tokens} tokens, hidden {size.hidden}, vocabulary {size.vocab}\n")
        cells = []
        for row in rows:
            if (row["shape"], row["dtype"]) != (shape, dtype):
                continue
            text_of = {name: _number(row[key], form) for name, key, form in _COLUMNS[1:]}
            if row["status"] != measure.OK:
                text_of["growth GB"] = f"{row['status']} at {_number(row['stopped_at_gb'], '.1f')} GB"
            label = ", ".join(filter(None, (row["divergence"], row["method"])))
            cells.append([label, *(text_of[name] for name in columns[1:])])
        text.append(measure.markdown_table(columns, cells))
    return "\n".join(text)


def plot(result: dict[str, Any], path: Path) -> None:
    """Peak growth (upper row) and CPU time, on a GPU wall time, (lower row) of the divergences that all have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["divergence"] in PEER_BETA]
    time_field = "wall_s" if all(row["cpu_s"] is None for row in rows) else "cpu_s"
    settings = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    if not settings:
        return
    figure, axes = pyplot.subplots(
        2, len(settings), figsize=(1.5 + 4.2 * len(settings), 7), squeeze=False, layout="constrained"
    )
    colors = dict(zip(LOSSES, ("#1b7837", "#7fbf7b", "#c2a5cf", "#9970ab", "#f1a340", "#fdb863"), strict=True))
    for column, (shape, dtype) in enumerate(settings):
        chosen = [row for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)]
        divergences = list(dict.fromkeys(row["divergence"] for row in chosen))
        methods = [method for method in LOSSES if any(row["method"] == method for row in chosen)]
        floor = [r for r in result["rows"] if (r["shape"], r["dtype"], r["method"]) == (shape, dtype, FLOOR)]
        for axis, field, unit in ((axes[0, column], "growth_gb", "GB"), (axes[1, column], time_field, "s")):
            width = 0.8 / len(methods)
            for row in chosen:
                x = divergences.index(row["divergence"]) + (methods.index(row["method"]) + 0.5) * width - 0.4
                if row[field] is None:
                    axis.text(
                        x, 0.02, row["status"], rotation=90, ha="center", va="bottom", fontsize=7, color="#b2182b",
                        transform=axis.get_xaxis_transform(),
                    )  # fmt: skip
                    continue
                bar = axis.bar(x, row[field], 0.92 * width, color=colors[row["method"]])
                axis.bar_label(bar, fmt="%.1f" if row[field] >= 1 else "%.2g", fontsize=7)
            if field == time_field and floor and floor[0][field] is not None:
                axis.axhline(floor[0][field], color="black", linestyle="--", linewidth=0.8)
            axis.set_xticks(range(len(divergences)), [name.replace("_", " ") for name in divergences], fontsize=8)
            axis.set_ylabel({"growth_gb": "peak growth", "cpu_s": "CPU time", "wall_s": "time"}[field] + f", {unit}")
            axis.set_xlim(-0.5, len(divergences) - 0.5)
            axis.margins(y=0.1)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(f"{shape}, {dtype}, {SHAPES[shape].tokens} tokens", fontsize=10)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    line = pyplot.Line2D([], [], color="black", linestyle="--", linewidth=0.8)
    figure.legend(
        [*handles, line], [*colors, "four matrix products alone"], loc="outside upper center", ncols=6, frameon=False
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def save(result: dict[str, Any], out: Path) -> None:
    """Write the measurements, the table and the plot: `out` with .json, .md and .png."""
    result["rows"] = summarize(result)
    measure.write_json(_beside(out, ".json"), result)
    write_text(_beside(out, ".md"), report(result))
    plot(result, _beside(out, ".png"))


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _gb(value: float | None) -> float | None:
    return None if value is None else value / measure.GB


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; known: {', '.join(known)}")
        return names

    return parse


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--shapes", type=_names(list(SHAPES)), default=["qwen2.5-0.5b", "gemma3-270m"])
    parser.add_argument("--dtypes", type=_names(list(DTYPES)), default=list(DTYPES))
    parser.add_argument("--methods", type=_names(METHODS), default=METHODS)
    parser.add_argument("--divergences", type=_names(list(DISTILLATION_LOSSES)), default=list(DISTILLATION_LOSSES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json, OUT.md and OUT.png")
    parser.add_argument("--append", action="store_true", help="keep the measurements that are already in --out")
    options = parser.parse_args(arguments)

    out = options.out
    methods = [name for name in options.methods if options.device != "cpu" or name not in GPU_ONLY]
    agreement = check_agreement(options.dtypes, methods, options.divergences, options.device)
    for error in agreement:
        print("{dtype} {divergence} {method}: loss {value:.1e}, gradient {gradient:.1e} off".format(**error))
    result: dict[str, Any] = {"commands": [], "records": [], "agreement": []}
    if options.append and _beside(out, ".json").exists():
        result |= json.loads(_beside(out, ".json").read_text())
    passed = list(arguments) if arguments is not None else sys.argv[1:]
    result["commands"].append(" ".join(["python -m benchmarks.kd_loss", *passed]))
    renewed = {(e["dtype"], e["method"], e["divergence"]) for e in agreement}
    kept = [e for e in result["agreement"] if (e["dtype"], e["method"], e["divergence"]) not in renewed]
    result["agreement"] = kept + agreement
    result["machine"] = measure.machine(["torch", "trl", "liger-kernel"]) | {"threads": options.threads}

    sitting = time.strftime("%Y-%m-%dT%H:%M:%S")
    for shape in options.shapes:
        for dtype in options.dtypes:
            earlier = {r["round"] for r in result["records"] if (r["shape"], r["dtype"]) == (shape, dtype)}
            cases = cases_of(methods, options.divergences, dtype)
            for number, (method, divergence) in measure.rounds_of(cases, options.rounds, len(earlier)):
                case = {"shape": shape, "dtype": dtype, "method": method, "divergence": divergence}
                record = measure.measure_in_child(
                    "benchmarks.kd_loss:step_of", case | {"device": options.device},
                    limit_bytes=measure.memory_limit(), threads=options.threads,
                )  # fmt: skip
                result["records"].append(case | {"round": f"{sitting} {number}"} | record)
                print(_line(case, record), flush=True)
                if record["status"] == measure.FAILED:
                    raise RuntimeError(f"{method} failed on {shape}, {dtype}, {divergence}:\n{record['output']}")
                save(result, out)


def _line(case: dict[str, str], record: dict[str, Any]) -> str:
    name = " ".join(filter(None, case.values()))
    if record["status"] != measure.OK:
        return f"{name}: {record['status']} at {record['seen_bytes'] / measure.GB:.1f} GB"
    growth = record["growth_bytes"] / measure.GB
    cpu = "" if record["cpu_s"] is None else f", {record['cpu_s']:.2f} s CPU"
    return f"{name}: {record['wall_s']:.4g} s wall{cpu}, grew by {growth:.3f} GB"


if __name__ == "__main__":
    main()
