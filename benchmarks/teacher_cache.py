"""What a teacher cache costs and what it keeps: bytes per token, gradient error, and the time of a training step.

    python -m benchmarks.teacher_cache --out benchmarks/results/teacher_cache

*Gradient error*: relative error of the gradient of forward KL in the student's logits against dense teacher rows, over
all tokens together, for rows that went through the cache (float16 included). One draw is what a training step sees;
the mean of 40 draws shows what does not average out. Logits look like language: the teacher's are a Zipf prior
-log(rank + 2.7) plus noise of standard deviation 5 for each token, the student's have 20 % of noise more. *Bytes* are
those of the files on disk, everything included; token ids take 2 bytes up to a vocabulary of 65,536, and 4 above.

*Step time*: the median optimizer step of `DistillationTrainer` on a small model (the sizes are in the table): plain
fine-tuning, a cached teacher, and a live one four times as large. The methods take turns, and ratios are taken within
a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_transfer_ext.files import write_text
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import divergence_of_logits
from hf_transfer_ext.losses.rows import LogitRows, TeacherRows
from hf_transfer_ext.teachers.cache import SHARDS, CacheSpec, TeacherCache
from hf_transfer_ext.teachers.documents import Document
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig

DRAWS = 40
COPIES = 40


def specs(k: int) -> list[CacheSpec]:
    """Each kind with k entries or draws."""
    return [CacheSpec("top", k), CacheSpec("top_and_samples", k - k // 4, k // 4), CacheSpec("samples", samples=k)]


def language_logits(tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    """(teacher, student)"""
    generator = torch.Generator().manual_seed(0)
    prior = -(torch.arange(vocab) + 2.7).log()
    teacher = prior + 5 * torch.randn(tokens, vocab, generator=generator)
    return teacher, teacher + torch.randn(tokens, vocab, generator=generator)


def gradient(student: Tensor, rows: TeacherRows) -> Tensor:
    leaf = student.clone().requires_grad_()
    loss = divergence_of_logits(leaf, rows, DISTILLATION_LOSSES["forward_kl"], weights=torch.ones(len(leaf))).loss
    return torch.autograd.grad(loss, leaf)[0]


def through_the_cache(spec: CacheSpec, logits: Tensor, draw: int) -> tuple[TeacherRows, float]:
    """Rows as they come back from disk, and bytes per token."""
    tokens, vocab = logits.shape
    fingerprint: dict[str, Any] = {"format": 1, "vocab_size": vocab, **vars(spec)}
    # Many texts share the header of a file, which is not to count for the few tokens here.
    documents = [Document(np.arange(tokens + 1) + i, np.arange(tokens)) for i in range(COPIES if draw == 0 else 1)]
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder) / "cache", fingerprint)
        found = spec.rows(logits, torch.Generator().manual_seed(draw))
        for document in documents:
            cache.add(document, found)
        cache.flush()
        rows = cache.rows(documents[:1], torch.device("cpu"))
        size = sum(path.stat().st_size for path in cache.folder.glob(SHARDS))
    return rows, size / tokens / len(documents)


def measure_errors(tokens: int, vocab: int, sizes: list[int]) -> list[dict[str, Any]]:
    teacher, student = language_logits(tokens, vocab)
    full = gradient(student, LogitRows(teacher))
    found = []
    for k in sizes:
        for spec in specs(k):
            single, sizes_on_disk, total, draws = [], [], torch.zeros_like(full), 1 if spec.kind == "top" else DRAWS
            for draw in range(draws):
                rows, size = through_the_cache(spec, teacher, draw)
                sizes_on_disk.append(size)
                own = gradient(student, rows)
                single.append(((own - full).norm() / full.norm()).item())
                total += own / draws
            mean = ((total - full).norm() / full.norm()).item()
            found.append(
                {
                    "k": k, "kind": spec.kind, "top": spec.top, "samples": spec.samples,
                    "bytes per token": sizes_on_disk[0],
                    "error of one draw": statistics.mean(single), f"error of the mean of {DRAWS}": mean,
                }
            )  # fmt: skip
            print(found[-1], flush=True)
    return found


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def small_model(seed: int, hidden: int, layers: int, vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def measure_steps(tokenizer: PreTrainedTokenizerBase, rounds: int, steps: int, length: int) -> dict[str, Any]:
    vocab, hidden, layers = 32_000, 384, 6
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (4 * steps, length), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": ids})
    times: dict[str, list[float]] = {"plain fine-tuning": [], "cached teacher": [], "live teacher": []}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str) -> float:
            options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0} if name == "plain fine-tuning" else {}
            if name == "cached teacher":
                options["teacher_cache"] = str(Path(folder) / "cache")
            args = DistillationConfig(
                output_dir=folder, use_cpu=True, bf16=False, report_to="none", max_steps=steps, max_length=length,
                per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True, logging_strategy="no",
                gradient_checkpointing=False, **options,
            )  # fmt: skip
            teacher = None if name == "plain fine-tuning" else small_model(1, 2 * hidden, layers, vocab)
            clock = StepTimes()
            trainer = DistillationTrainer(
                small_model(0, hidden, layers, vocab), teacher, args, data, processing_class=tokenizer,
                teacher_processing_class=tokenizer, callbacks=[clock],
            )  # fmt: skip
            trainer.train()
            return statistics.median(clock.seconds[1:])

        run("cached teacher")  # fills the cache
        for _ in range(rounds):
            for name in times:
                times[name].append(run(name))
                print(name, times[name][-1], flush=True)
    plain = times["plain fine-tuning"]
    return {
        "student": f"{layers} layers of width {hidden}, vocabulary {vocab}",
        "teacher": f"{layers} layers of width {2 * hidden}",
        "batch": f"4 rows of {length} tokens",
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio to plain fine-tuning": {
            name: statistics.median(a / b for a, b in zip(values, plain, strict=True))
            for name, values in times.items()
        },
        "rounds": rounds,
    }


def table(content: dict[str, Any]) -> str:
    mean = f"error of the mean of {DRAWS}"
    lines = [
        "# Teacher cache", "",
        f"Gradient error against dense rows, forward KL, vocabulary {content['vocab']}, {content['tokens']} tokens. "
        "Made by `python -m benchmarks.teacher_cache`; its docstring says what is measured.", "",
        f"| kind | top | samples | bytes per token | error of one draw | {mean} |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(content["errors"], key=lambda row: (row["kind"], row["k"])):
        lines.append(
            f"| {row['kind']} | {row['top']} | {row['samples']} | {row['bytes per token']:.0f} | "
            f"{row['error of one draw']:.3f} | {row[mean]:.4f} |"
        )
    steps = content["steps"]
    lines += [
        "", f"One optimizer step on {content['threads']} thread(s) of a CPU, {steps['batch']}; student: "
        f"{steps['student']}; teacher: {steps['teacher']}; default cache. Median of {steps['rounds']} rounds.", "",
        "| | seconds | ratio to plain fine-tuning |", "|---|---|---|",
    ]  # fmt: skip
    for name, seconds in steps["seconds"].items():
        lines.append(f"| {name} | {seconds:.3f} | {steps['ratio to plain fine-tuning'][name]:.2f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, help="Result without its ending: OUT.json and OUT.md are written.")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args(argv)
    words = FastTokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    content = {
        "tokens": args.tokens, "vocab": args.vocab, "threads": torch.get_num_threads(),
        "errors": measure_errors(args.tokens, args.vocab, args.k),
        "steps": measure_steps(tokenizer, args.rounds, args.steps, args.length),
    }  # fmt: skip
    write_text(f"{args.out}.json", json.dumps(content, indent=2) + "\n")
    write_text(f"{args.out}.md", table(content))
    return content


if __name__ == "__main__":
    main()
