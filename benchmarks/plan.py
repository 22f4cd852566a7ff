"""The estimates of `hf-transfer-ext doctor --plan` compared with measured peaks and times of training, on this CPU.

    python -m benchmarks.plan --out benchmarks/results/plan

trains two steps of distillation for each configuration in a separate process, from the models to the optimizer, and
compares the growth of its memory with the estimate. The time of a step is estimated from the rate of matrix products
that is measured in the same process. The shapes of 7B and 70B models on GPUs are printed, not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.measure import measure_in_child
from hf_transfer_ext.files import write_text

#: Name -> (student, teacher, training). Sizes are (hidden, inner, layers); rows of `length` random tokens.
CASES: dict[str, dict[str, Any]] = {
    "fine-tuning": {"student": (256, 768, 8), "rows": 4, "length": 512},
    "distillation": {"student": (256, 768, 8), "teacher": (384, 1024, 6), "rows": 4, "length": 512},
    "long rows": {"student": (256, 768, 8), "teacher": (384, 1024, 6), "rows": 2, "length": 1024},
    "checkpointing": {
        "student": (256, 768, 8), "teacher": (384, 1024, 6), "rows": 2, "length": 1024, "checkpointing": True,
    },
    "whole logits": {"student": (256, 768, 8), "teacher": (384, 1024, 6), "rows": 2, "length": 512, "fused": False},
    "LoRA": {"student": (384, 1024, 6), "teacher": (384, 1024, 6), "rows": 4, "length": 512, "rank": 16},
    "sgd": {"student": (384, 1024, 6), "teacher": (384, 1024, 6), "rows": 4, "length": 512, "optimizer": "sgd"},
    "deep": {"student": (256, 768, 16), "teacher": (256, 768, 8), "rows": 4, "length": 512},
    "sequence classification": {
        "student": (256, 768, 8), "teacher": (384, 1024, 6), "rows": 16, "length": 256,
        "task": "sequence_classification",
    },
    "token classification": {
        "student": (256, 1024, 8), "teacher": (256, 1024, 8), "rows": 8, "length": 512, "task": "token_classification",
    },
    "masked tokens": {
        "student": (256, 768, 8), "teacher": (384, 1024, 6), "rows": 16, "length": 256, "task": "masked_lm",
    },
    "encoder-decoder": {
        "student": (256, 768, 6), "teacher": (384, 1024, 4), "rows": 8, "length": 256, "task": "seq2seq",
    },
}  # fmt: skip
VOCABULARY = 8192
#: Published shapes: (hidden, inner, layers, heads of keys, heads, vocabulary).
LARGE = {"7B": (4096, 11008, 32, 32, 32, 32000), "70B": (8192, 28672, 80, 8, 64, 128256)}


def config_of(sizes: Any, heads: int = 8, key_heads: int = 4, vocabulary: int = VOCABULARY) -> Any:
    from transformers import LlamaConfig

    hidden, inner, layers = sizes
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=4096, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip


def task_config_of(task: str, sizes: Any, heads: int = 8) -> Any:
    """A BERT, or a T5 for `seq2seq`, with the dropout that they have by default."""
    from transformers import BertConfig, T5Config

    hidden, inner, layers = sizes
    if task == "seq2seq":
        return T5Config(
            vocab_size=VOCABULARY, d_model=hidden, d_ff=inner, d_kv=hidden // heads, num_layers=layers,
            num_heads=heads, decoder_start_token_id=0,
        )  # fmt: skip
    return BertConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=512, num_labels=2,
        id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip


def task_rows(task: str, case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Columns of rows that are as long as the case says, settings of the task); a letter is a token."""
    count, length = 2 * case["rows"], case["length"]
    text = ["ab" * (length // 2)] * count
    words = {"tokens": [["a"] * length] * count, "labels": [["no", "yes"] * (length // 2)] * count}
    columns: dict[str, dict[str, Any]] = {
        "sequence_classification": {"text": text, "label": ["no", "yes"] * case["rows"]},
        "token_classification": words,
        "masked_lm": {"text": text},
        "seq2seq": {"source": text, "target": text},
    }
    options = {"task_options": {"max_target_length": length}} if task == "seq2seq" else {}
    return columns[task], options


def estimated(case: dict[str, Any]) -> Any:
    from hf_transfer_ext.trainers.estimate import Shape, Step, kept_bytes, predicted_tokens

    if "task" in case:
        task, rows, length = case["task"], case["rows"], case["length"]
        configs = [task_config_of(task, case[name]) for name in ("student", "teacher")]
        kept = kept_bytes(
            configs[0], task, length=length, target_length=length if task == "seq2seq" else 0, fused_attention=False
        )
        return Step(
            *(Shape.of(configs[0], task), rows * length, Shape.of(configs[1], task)), device="cpu", length=length,
            kept=rows * kept, predicted=predicted_tokens(task, rows * length),
        )  # fmt: skip
    student = Shape.of(config_of(case["student"]))
    return Step(
        student, case["rows"] * case["length"],
        Shape.of(config_of(case["teacher"])) if "teacher" in case else None,
        trained=student.adapter_parameters(case.get("rank", 0)),
        optimizer=case.get("optimizer", "adamw"), checkpointing=case.get("checkpointing", False),
        fused=case.get("fused", True), device="cpu", length=case["length"],
    )  # fmt: skip


def step_of(name: str) -> Callable[[], Any]:
    """Two steps of the trainer, from the models on; imports are done before."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from benchmarks.long_jobs import bytes_as_tokens
    from hf_transfer_ext.trainers.distillation import DistillationConfig, DistillationTrainer
    from hf_transfer_ext.trainers.taught import lora_config

    case = CASES[name]
    if "task" in case:
        return task_step_of(case)
    rates = measured_rates()

    def step() -> dict[str, float]:
        torch.manual_seed(0)
        student = AutoModelForCausalLM.from_config(config_of(case["student"]))
        teacher = AutoModelForCausalLM.from_config(config_of(case["teacher"])) if "teacher" in case else None
        with tempfile.TemporaryDirectory() as folder:
            args = DistillationConfig(
                folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=2,
                per_device_train_batch_size=case["rows"], max_length=case["length"], logging_strategy="no",
                gradient_checkpointing=case.get("checkpointing", False), fused=case.get("fused", True),
                optim="sgd" if case.get("optimizer") == "sgd" else "adamw_torch",
                kd_weight=float(teacher is not None), ce_weight=float(teacher is None),
            )  # fmt: skip
            rows = torch.randint(2, VOCABULARY, (2 * case["rows"], case["length"])).tolist()
            lora = lora_config(case["rank"]) if "rank" in case else None
            trainer = DistillationTrainer(
                student, teacher, args, Dataset.from_dict({"input_ids": rows}), processing_class=bytes_as_tokens(),
                peft_config=lora,
            )  # fmt: skip
            marks: list[float] = []
            original = trainer.training_step

            def timed(*inputs: Any, **options: Any) -> Any:
                marks.append(time.perf_counter())
                return original(*inputs, **options)

            trainer.training_step = timed  # type: ignore[method-assign]
            trainer.train()
        return {"step_seconds": marks[1] - marks[0], **rates}

    return step


def task_step_of(case: dict[str, Any]) -> Callable[[], Any]:
    """Two steps of the trainer of the other tasks, from the models on."""
    import torch
    import transformers
    from datasets import Dataset

    from benchmarks.long_jobs import bytes_as_tokens
    from hf_transfer_ext.trainers.distillation import DistillationConfig
    from hf_transfer_ext.trainers.task_distillation import TaskDistillationTrainer
    from hf_transfer_ext.weights.kinds import MODEL_KINDS

    task = case["task"]
    tokenizer = bytes_as_tokens()
    tokenizer.mask_token = "<s>"
    columns, options = task_rows(task, case)

    def step() -> dict[str, float]:
        torch.manual_seed(0)
        auto = getattr(transformers, MODEL_KINDS[task].auto_class)
        student, teacher = (auto.from_config(task_config_of(task, case[name])) for name in ("student", "teacher"))
        with tempfile.TemporaryDirectory() as folder:
            args = DistillationConfig(
                folder, task=task, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
                max_steps=2, per_device_train_batch_size=case["rows"], max_length=case["length"],
                logging_strategy="no", gradient_checkpointing=False, optim="adamw_torch", **options,
            )  # fmt: skip
            data = Dataset.from_dict(columns)
            TaskDistillationTrainer(student, teacher, args, data, tokenizer, tokenizer).train()
        return {}

    return step


def measured_rates() -> dict[str, float]:
    """The fields of `estimate.Rates` on this CPU, in float32, each from operations of one kind alone."""
    import torch

    def seconds(run: Callable[[], Any], rounds: int) -> float:
        run()
        began = time.perf_counter()
        for _ in range(rounds):
            run()
        return (time.perf_counter() - began) / rounds

    one, other = torch.randn(2048, 768), torch.randn(768, 2048)
    query = torch.randn(4, 8, 512, 32, requires_grad=True)
    logits, large = torch.randn(512, VOCABULARY), torch.randn(8_000_000)
    room = torch.empty_like(large)

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    pairs = 4 * 8 * 512 * 512 * 32  # two products over half of the pairs, and 2.5 times as many in the backward pass
    return {
        "products": 2 * 2048 * 768 * 2048 / seconds(lambda: torch.mm(one, other), 12),
        "attention": 3.5 * 2 * pairs / seconds(attend, 4),
        "exponentials": logits.numel() / seconds(lambda: torch.exp(logits), 4),
        "bandwidth": 3 * 4 * large.numel() / seconds(lambda: torch.add(large, large, out=room), 4),
    }


def large_lines() -> list[str]:
    """What the largest usual shapes need on eight GPUs of 80 GB."""
    from hf_transfer_ext.trainers.estimate import GPU_RATES, Shape, Step

    lines = ["| student | teacher | set-up | GB per device | s per micro-batch |", "|---|---|---|---:|---:|"]
    shapes = {name: Shape.of(config_of(sizes[:3], sizes[4], sizes[3], sizes[5])) for name, sizes in LARGE.items()}
    bf16: dict[str, Any] = {"precision": 2.0, "teacher_bytes": 2.0, "checkpointing": True}
    for student, teacher in (("7B", "70B"), ("70B", "70B")):
        for setup, options in (
            ("fsdp2 on 8", {"shards": 8}),
            ("fsdp2 on 64", {"shards": 64}),
            ("fsdp2 on 8, cached teacher", {"shards": 8, "cached": True}),
        ):
            options, cached = dict(options), options.get("cached", False)
            options.pop("cached", None)
            taught = None if cached else shapes[teacher]
            step = Step(shapes[student], 2 * 2048, taught, length=2048, **bf16, **options)
            seconds = sum(step.seconds(GPU_RATES).values())
            needed = sum(step.memory().values()) / 1e9
            lines.append(f"| {student} | {'-' if cached else teacher} | {setup} | {needed:.0f} | {seconds:.1f} |")
    return lines


def line_of(row: dict[str, Any]) -> str:
    """A line of the table."""
    times = [f"{row[name]:.1f}" if name in row else "-" for name in ("estimated_seconds", "measured_seconds")]
    memory = f"{row['estimated'] / 1e9:.2f} | {row['measured'] / 1e9:.2f} | {row['error']:+.0%}"
    return f"| {row['case']} | {memory} | {' | '.join(times)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Estimates of training compared with measured peaks.")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.md and OUT.json")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--keep", action="store_true", help="keep the rows of OUT.json for all other cases")
    options = parser.parse_args(argv)
    from hf_transfer_ext.trainers.estimate import Rates

    rows: list[dict[str, Any]] = []
    if options.keep:
        earlier = json.loads(options.out.with_suffix(".json").read_text())
        rows = [row for row in earlier if row["case"] not in options.cases]
    for name in options.cases:
        found = measure_in_child("benchmarks.plan:step_of", {"name": name}, limit_bytes=8e9)
        if found["status"] != "ok":
            raise RuntimeError(f"{name}: {found}")
        step = estimated(CASES[name])
        memory, peak = sum(step.memory().values()), found["growth_bytes"]
        row = {"case": name, "estimated": memory, "measured": peak, "error": memory / peak - 1, "parts": step.memory()}
        if step.kept is None:
            seconds = step.seconds(Rates(**{name.name: found[name.name] for name in fields(Rates)}))
            row |= {"estimated_seconds": sum(seconds.values()), "measured_seconds": found["step_seconds"],
                    "seconds_by_part": seconds}  # fmt: skip
        rows.append(row)
        print(line_of(row), flush=True)
    rows.sort(key=lambda row: list(CASES).index(row["case"]))
    lines = ["| configuration | estimated GB | measured GB | error | estimated s | measured s |"]
    lines += ["|---|---:|---:|---:|---:|---:|", *map(line_of, rows)]
    text = "\n".join(
        [
            "# Memory and time on paper",
            "",
            "`python -m benchmarks.plan --out benchmarks/results/plan` trains two steps for each configuration in a",
            "process of its own and compares the growth of its memory with the estimate of `doctor --plan`. Times are",
            "estimated from what the same process does in a second of each kind of work: matrix products, attention,",
            "exponentials of the loss, and bytes moved. Other work on the machine changes these rates between the two",
            "measurements. The constant of 0.1 GB for what a process takes beside its tensors was chosen after the",
            "peaks of this table were seen; the other terms were not fitted. For the last four rows (BERT, and T5 as",
            "the encoder-decoder), what the student keeps for the backward pass is counted in a forward pass without",
            "memory; their time is not estimated.",
            "",
            *lines,
            "",
            "Not measured: 8 or 64 devices, 2 rows of 2048 tokens on each, bfloat16, checkpointing, AdamW.",
            "",
            *large_lines(),
            "",
        ]
    )
    write_text(options.out.with_suffix(".md"), text)
    write_text(options.out.with_suffix(".json"), json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
