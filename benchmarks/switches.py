"""Time and memory of a step of distillation with each memory and speed switch on, beside the same step without.

    python -m benchmarks.switches --out benchmarks/results/switches

The student is a small Llama with a real vocabulary (32 k) and random weights, the teacher another one; rows have very
different lengths. Each measurement is a step after the first one, which `train()` has done in the same process (the
states of the optimizer exist, graphs are compiled, a cache is filled): forward, backward and update. Seconds are those
of the processor, all threads together, so that other work on the machine weighs little; growth is the peak of resident
memory during the step over that before it; "held" is what was resident before it. Children return freed tensors to the
system at once (`MALLOC_MMAP_THRESHOLD_`), or memory that an earlier step took would hide the growth; each step pays
for that with page faults, so that its seconds are for comparison here alone. The columns
"times" are ratios to the step without a switch, within each round. A switch that this machine cannot run is in the
table with the reason that was given.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.distillation_step import model_of, tokenizer_of_bytes

PLAIN = "none"
#: Switch -> settings of `DistillationConfig`. Those of `HOW` are not fields of it.
SWITCHES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "attn_implementation: eager": {"attention": "eager"},
    "attn_implementation: flash_attention_2": {"attention": "flash_attention_2"},
    "fused: false (whole logits)": {"fused": False},
    "torch_compile": {"torch_compile": True},
    "torch_compile, fused: false": {"torch_compile": True, "fused": False},
    "packing": {"packing": True},
    "padding_free": {"padding_free": True, "max_length": None},
    "bf16": {"bf16": True},
    "use_liger_kernel": {"use_liger_kernel": True},
    "optim: adafactor": {"optim": "adafactor"},
    "optim: adamw_8bit": {"optim": "adamw_8bit"},
    "optim: paged_adamw_8bit": {"optim": "paged_adamw_8bit"},
    "activation_offloading": {"activation_offloading": True},
    "a LoRA (rank 16)": {"rank": 16},
    "teacher on the disk (device_map)": {"teacher": "disk"},
    "teacher_cache (top 64)": {"teacher": "cache"},
    "no teacher (kd_weight: 0)": {"teacher": "none", "kd_weight": 0.0, "ce_weight": 1.0},
}
#: Keys of `SWITCHES` that say how the models are made.
HOW = ("attention", "rank", "teacher")


def step_of(switch: str, batch: int, length: int, vocabulary: int, hidden: int, layers: int) -> Callable[[], Any]:
    """The second step of a trainer with one switch on, the first one done; returns tokens, loss and graphs."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from hf_transfer_ext import DistillationConfig, DistillationTrainer

    settings = dict(SWITCHES[switch])
    how = {name: settings.pop(name, None) for name in HOW}
    letters, folder = random.Random(0), tempfile.mkdtemp()
    lengths = [length // (1 + row % 4) - 1 for row in range(batch)]  # of bytes, with an end of sequence to come
    rows = ["".join(letters.choices("abcdefgh ", k=count)) for count in lengths] * 2
    base: dict[str, Any] = {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1,
        "max_length": length,
        "per_device_train_batch_size": batch, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-4, "train_sampling_strategy": "sequential", "seed": 0,
    }  # fmt: skip
    models = [model_of(seed, vocabulary, hidden, layers) for seed in (1, 2)]
    for model in models:
        if how["attention"] is not None:
            model.set_attn_implementation(how["attention"])
    student, teacher = models
    if how["rank"] is not None:
        student = get_peft_model(student, LoraConfig(r=how["rank"], target_modules="all-linear"))
    if how["teacher"] == "disk":
        teacher = _on_disk(teacher, folder)
    if how["teacher"] == "cache":
        settings |= {"teacher_cache": f"{folder}/cache", "teacher_cache_options": {"kind": "top", "top": 64}}
    if settings.get("packing"):
        base["per_device_train_batch_size"] = max(1, sum(len(row) + 1 for row in rows[:batch]) // length)
    args = DistillationConfig(**{**base, **settings})
    data = Dataset.from_dict({"text": rows})
    teacher = None if how["teacher"] == "none" else teacher
    trainer = DistillationTrainer(student, teacher, args, data, processing_class=tokenizer_of_bytes())
    del models, student, teacher
    trainer.train()  # one step, with everything that is set up for a training

    def step() -> dict[str, float]:
        samples, count = trainer.get_batch_samples(batches, 1, trainer.args.device)
        loss = trainer.training_step(trainer.model_wrapped, samples[0], count)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        stats = torch._dynamo.utils.counters if args.torch_compile else {"stats": {}, "graph_break": {}}
        given = samples[0]
        tokens = given["attention_mask"].sum() if "attention_mask" in given else given["input_ids"].numel()
        return {
            "tokens": float(tokens), "loss": float(loss), "graphs": float(stats["stats"].get("unique_graphs", 0)),
            "graph_breaks": float(sum(stats["graph_break"].values())),
        }  # fmt: skip

    batches = iter(trainer.get_train_dataloader())  # with the rows of the first step, which a cache holds by now
    return step


def _on_disk(teacher: Any, folder: str) -> Any:
    """The teacher with its layers on the disk, as `teacher_model_init_kwargs: {device_map: ...}` loads it."""
    from transformers import AutoModelForCausalLM

    teacher.save_pretrained(f"{folder}/teacher")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers": "disk"}
    where = {"device_map": places, "offload_folder": f"{folder}/offload"}
    return AutoModelForCausalLM.from_pretrained(f"{folder}/teacher", **where)


def error_in(record: measure.Record) -> str:
    """The last line of a failed step's output that names an error; "" where none does."""
    lines = [line.strip() for line in str(record.get("output", "")).splitlines()]
    return next((line for line in lines[::-1] if line.split(":")[0].endswith(("Error", "Exception"))), "")


def reason_of(record: measure.Record) -> str:
    """Why a switch did not run."""
    return error_in(record).partition(": ")[2] or str(record["status"])


def rows_of(records: Sequence[measure.Record]) -> list[list[str | None]]:
    """One row for each switch: medians, and ratios to the plain step of the same round."""
    plain = [record for record in records if record["switch"] == PLAIN]
    rows: list[list[str | None]] = []
    for switch in SWITCHES:
        own = [record for record in records if record["switch"] == switch]
        good = [record for record in own if record["status"] == measure.OK]
        if not own:
            continue
        if not good:
            rows.append([switch, None, None, None, None, None, reason_of(own[-1])])
            continue
        tokens, seconds = (measure.median(good, name) or 0.0 for name in ("tokens", "cpu_s"))
        rates = [r | {"rate": r["tokens"] / r["cpu_s"]} for r in good]
        plain_rates = [r | {"rate": r["tokens"] / r["cpu_s"]} for r in plain if r["status"] == measure.OK]
        growth = measure.median(good, "growth_bytes") or 0.0
        held = measure.median(good, "before_bytes") or 0.0
        faster = measure.paired_ratio(rates, plain_rates, "rate")
        more = measure.paired_ratio(good, plain, "growth_bytes")
        graphs = max(record["graphs"] for record in good)
        breaks = max(record["graph_breaks"] for record in good)
        note = f"{graphs:.0f} graphs, {breaks:.0f} graph breaks" if graphs else ""
        rows.append(
            [
                switch,
                f"{tokens / seconds:.0f}",
                None if faster is None else f"{faster:.2f}",
                f"{growth / 1e6:.0f}",
                None if more is None else f"{more:.2f}",
                f"{held / 1e6:.0f}",
                note,
            ]
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> list[measure.Record]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--switches", nargs="+", choices=SWITCHES, default=list(SWITCHES))
    for name, value in (("rounds", 1), ("batch", 8), ("length", 256), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("vocabulary", 32_000), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args(arguments)
    sizes = {n: getattr(options, n) for n in ("batch", "length", "vocabulary", "hidden", "layers")}
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 18))
    records: list[measure.Record] = []
    for number, switch in measure.rounds_of(options.switches, options.rounds):
        record = measure.measure_in_child(
            "benchmarks.switches:step_of", {"switch": switch, **sizes}, limit_bytes=measure.memory_limit(),
            timeout_s=180, threads=options.threads,
        )  # fmt: skip
        if record["status"] != measure.OK:
            record["output"] = error_in(record)  # a whole traceback would name the files of this machine
        records.append({"switch": switch, "round": number, **record})
        shown = {name: record.get(name) for name in ("status", "cpu_s", "growth_bytes", "tokens")}
        print(switch, shown if record["status"] == measure.OK else reason_of(record), flush=True)
    columns = ["switch", "tokens per CPU second", "times", "growth, MB", "times", "held, MB", "note"]
    found = measure.machine(["torch", "transformers", "trl", "bitsandbytes", "liger-kernel"])
    found |= {"threads": options.threads}
    given = " ".join(arguments) if arguments is not None else " ".join(sys.argv[1:])
    measure.report_steps(
        "Memory and speed switches of a step of distillation",
        f"python -m benchmarks.switches {given}", options.rounds, sizes | found,
        measure.markdown_table(columns, rows_of(records)), options.out,
        {"settings": sizes, "machine": found, "records": records},
    )  # fmt: skip
    return records


if __name__ == "__main__":
    main()
