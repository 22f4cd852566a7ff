"""Whole training steps of distillation beside TRL's trainers and plain SFT: tokens per CPU second and memory.

    python -m benchmarks.distillation_step --out benchmarks/results/distillation_step

A step is what a trainer does between two batches: count the tokens, write texts where it is on-policy, run teacher and
student, forward and backward, and update the weights (AdamW). All trainers have the same models with random weights, a
large vocabulary and the same rows of messages, all of one length, in float32; the student writes as many tokens as the
completions of the data have. `sft` is TRL's SFTTrainer on the same rows, without a teacher; `trl distillation` is the
trainer of TRL's stable interface, which is always on-policy; `trl gold` and `ours, across tokenizers` have a teacher
whose tokenizer also has all pairs of letters as tokens, and whose vocabulary is as large as Gemma's. `ours, cached
teacher` reads outputs that were stored in a first epoch. Each measurement is the last step of a fresh process, after
one step of every batch, so that the states of the optimizer exist; growth is the peak of resident memory during the
step over that before it. Methods take turns in rounds; the table gives medians. Seconds are those of the processor,
all threads together, so that other work on the machine weighs little. Tokens are those of the student's last forward
pass with gradients.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure

#: Method -> (trainer, share of the batches that the student writes, the divergence or TRL's beta).
METHODS: dict[str, tuple[str, float, str]] = {
    "sft": ("sft", 0.0, ""),
    "ours, forward KL": ("ours", 0.0, "forward_kl"),
    "trl gkd, forward KL": ("gkd", 0.0, "0.0"),
    "ours, JSD": ("ours", 0.0, "generalized_jsd"),
    "trl gkd, JSD": ("gkd", 0.0, "0.5"),
    "ours, on-policy reverse KL": ("ours", 1.0, "reverse_kl"),
    "trl gkd, on-policy reverse KL": ("gkd", 1.0, "1.0"),
    "trl distillation, on-policy reverse KL": ("trl", 1.0, "1.0"),
    "ours, on-policy, sampled tokens": ("ours", 1.0, "sampled"),
    "ours, cached teacher": ("cached", 0.0, "forward_kl"),
    "ours, across tokenizers": ("across", 0.0, "gold"),
    "trl gold, across tokenizers": ("gold", 0.0, "0.5"),
}
#: Method -> the one that it is compared with.
PEERS = {
    "ours, forward KL": "trl gkd, forward KL",
    "ours, JSD": "trl gkd, JSD",
    "ours, on-policy reverse KL": "trl distillation, on-policy reverse KL",
    "ours, on-policy, sampled tokens": "trl distillation, on-policy reverse KL",
    "ours, cached teacher": "sft",
    "ours, across tokenizers": "trl gold, across tokenizers",
}
#: Entries of the vocabulary of a teacher with another tokenizer.
OTHER_VOCABULARY = 262_144
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer_of_bytes(pairs: bool = False) -> Any:
    """One token per byte; with `pairs`, also one for every two letters of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    merges = [(a, b) for a in LETTERS for b in LETTERS] if pairs else []
    vocabulary = {s: i for i, s in enumerate([*symbols, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_of(seed: int, vocabulary: int, hidden: int, layers: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, eos_token_id=256, pad_token_id=256,
        bos_token_id=256, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step_of(
    method: str, batch: int, prompt: int, completion: int, vocabulary: int, hidden: int, layers: int
) -> Callable[[], dict[str, float]]:
    """A step of a trainer that has seen every batch once; returns the tokens that it trained on."""
    import random

    import torch
    from datasets import Dataset

    kind, share, loss = METHODS[method]
    letters = random.Random(0)

    def text(length: int) -> str:
        return "".join(letters.choices(LETTERS, k=length))

    # "u:" before the prompt and "a:" behind it, and an end after the completion
    turns = [
        ({"role": "user", "content": text(prompt - 4)}, {"role": "assistant", "content": text(completion - 1)})
        for _ in range(2 * batch)
    ]
    data = Dataset.from_list([{"messages": list(both)} for both in turns])
    pairs = Dataset.from_list([{"prompt": [one], "completion": [other]} for one, other in turns])
    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2,
        "per_device_train_batch_size": batch, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-4, "max_length": prompt + completion,
    }  # fmt: skip
    sizes = vocabulary, hidden, layers
    trainer: Any
    if kind == "gkd":
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        gkd = GKDConfig(**shared, lmbda=share, beta=float(loss), temperature=1.0, max_new_tokens=completion)
        trainer = GKDTrainer(
            model_of(1, *sizes), model_of(2, *sizes), gkd, train_dataset=data, processing_class=tokenizer_of_bytes()
        )
    elif kind == "trl":
        from trl import DistillationConfig as TRLConfig
        from trl import DistillationTrainer as TRLTrainer

        del shared["max_length"]
        asked = Dataset.from_list([{"prompt": [one]} for one, _ in turns])
        own = {"beta": float(loss), "temperature": 1.0, "max_completion_length": completion}
        trainer = TRLTrainer(
            model_of(1, *sizes), model_of(2, *sizes), TRLConfig(**shared, **own), asked,
            processing_class=tokenizer_of_bytes(),
        )  # fmt: skip
    elif kind == "gold":
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.gold import GOLDConfig, GOLDTrainer

        folder = tempfile.mkdtemp()
        tokenizer_of_bytes(pairs=True).save_pretrained(folder)
        gold = GOLDConfig(
            **shared, lmbda=share, beta=float(loss), temperature=1.0, max_completion_length=completion,
            use_uld_loss=True, uld_use_hybrid_loss=True, teacher_tokenizer_name_or_path=folder,
        )  # fmt: skip
        trainer = GOLDTrainer(
            model_of(1, *sizes), model_of(2, OTHER_VOCABULARY, hidden, layers), gold, train_dataset=data,
            processing_class=tokenizer_of_bytes(),
        )  # fmt: skip
    elif kind == "sft":
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model_of(1, *sizes), SFTConfig(**shared), train_dataset=pairs, processing_class=tokenizer_of_bytes()
        )
    else:
        from hf_transfer_ext import DistillationConfig, DistillationTrainer

        own = {"loss": "reverse_kl" if loss == "sampled" else loss}
        across = kind == "across"
        if kind == "cached":
            own["teacher_cache"] = tempfile.mkdtemp()
        if share:
            name = "sampled_reverse_kl" if loss == "sampled" else "gkd"
            own |= {"on_policy": name, "on_policy_share": share, "max_new_tokens": completion}
        teacher = model_of(2, OTHER_VOCABULARY if across else vocabulary, hidden, layers)
        trainer = DistillationTrainer(
            model_of(1, *sizes), teacher, DistillationConfig(**shared, **own), pairs,
            processing_class=tokenizer_of_bytes(), teacher_processing_class=tokenizer_of_bytes(pairs=across),
        )  # fmt: skip
    trainer.create_optimizer()
    seen: list[float] = []

    def count_tokens(module: Any, args: Any, given: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            mask = given.get("attention_mask")
            seen[:] = [float(given["input_ids"].numel() if mask is None else mask.sum())]

    trainer.model.model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    batches = itertools.chain(trainer.get_train_dataloader(), trainer.get_train_dataloader())

    def step() -> dict[str, float]:
        samples, count = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.model, samples[0], count)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return {"tokens": seen[0]}

    step()
    step()
    return step


def rows_of(records: Sequence[measure.Record]) -> list[list[str]]:
    """One row for each method: medians, and ratios to its peer within each round."""
    rows = []
    for method in METHODS:
        own = [r for r in records if r["method"] == method]
        if not own:
            continue
        good = [r for r in own if r["status"] == measure.OK]
        if not good:
            rows.append([method, own[-1]["status"], "-", "-", "-"])
            continue
        seconds, grown = (measure.median(good, name) or 0.0 for name in ("cpu_s", "growth_bytes"))
        peers = [r for r in records if r["method"] == PEERS.get(method) and r["status"] == measure.OK]
        faster, less = (
            measure.paired_ratio(peers, good, name) if peers else None for name in ("cpu_s", "growth_bytes")
        )
        rows.append(
            [
                method,
                f"{measure.median(good, 'tokens') / seconds:.0f}",  # type: ignore[operator]
                f"{grown / measure.GB:.2f}",
                "-" if faster is None else f"{faster:.2f}x",
                "-" if less is None else f"{less:.2f}x",
            ]
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> list[measure.Record]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    for name, value in (("rounds", 2), ("batch", 4), ("prompt", 32), ("completion", 64), ("hidden", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("layers", 2), ("vocabulary", 151_936), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args(arguments)
    sizes = {n: getattr(options, n) for n in ("batch", "prompt", "completion", "vocabulary", "hidden", "layers")}
    records: list[measure.Record] = []
    for number, method in measure.rounds_of(options.methods, options.rounds):
        record = measure.measure_in_child(
            "benchmarks.distillation_step:step_of", {"method": method, **sizes}, limit_bytes=measure.memory_limit(),
            threads=options.threads,
        )  # fmt: skip
        records.append({"method": method, "round": number, **record})
        if record["status"] == measure.FAILED:
            raise RuntimeError(f"{method} failed:\n{record['output']}")
        print(method, {name: record.get(name) for name in ("status", "cpu_s", "growth_bytes", "tokens")}, flush=True)
    columns = ["step", "tokens per CPU second", "memory growth, GB", "speed over peer", "peer's growth over ours"]
    found = measure.machine(["torch", "transformers", "trl"]) | {"threads": options.threads}
    given = " ".join(arguments) if arguments is not None else " ".join(sys.argv[1:])
    measure.report_steps(
        "Whole training steps of distillation",
        f"python -m benchmarks.distillation_step {given}", options.rounds, sizes | found,
        measure.markdown_table(columns, rows_of(records)), options.out,
        {"settings": sizes, "machine": found, "records": records},
    )  # fmt: skip
    return records


if __name__ == "__main__":
    main()
