"""One unlearning step beside a plain fine-tuning step on the same tokens, with one LoRA, on a CPU: time and memory.

    python -m benchmarks.unlearning_steps --rounds 12 --out benchmarks/results/unlearning_steps

A step is a forward and backward pass and an update of the adapter. Plain fine-tuning is the model's own loss
(`model(labels=...)`, whole logits) on the rows to forget and to retain in one batch: as many tokens as a method sees.
Methods and plain steps take turns within each round, and ratios are taken within a round, so that other work on the
machine weighs on both; the table gives medians over the rounds. Two rounds come before the first: what a method
computes once, before its first step (`prepare`), is not part of a step. Seconds are those of the processor. Memory is
the peak of the resident memory during the third step of a process over that before it. The model is a Llama with
random weights; texts are random words of a byte tokenizer. Methods that need it get a column "alternative" or "name",
a hidden layer at half of the depth, a second adapter (`whp`), or a LoRA without zeros (`prune_first`).
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import measure
from hf_transfer_ext.data.forget_retain import forget_retain_collator
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer

PLAIN = "plain"
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
#: Settings of the methods that need some.
SETTINGS: dict[str, dict[str, Any]] = {
    "whp": {"reinforced_adapter": "reinforced"},
    **{name: {"hidden_layer": "half"} for name in ("rmu", "laf", "scar")},
}


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    made = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")


def adapted_model(vocabulary: int, hidden: int, layers: int, **lora: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, eos_token_id=256, pad_token_id=256,
        bos_token_id=256,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear", **lora))


def rows(name: str, count: int, length: int) -> list[dict[str, str]]:
    words = random.Random(name)
    text = "abcdefghij klmnop"
    return [
        {
            "question": f"{name} {i} " + "".join(words.choices(text, k=length)),
            "answer": "".join(words.choices(text, k=length)),
            "alternative": "".join(words.choices(text, k=length)),
            "name": f"{name} {i}",
        }
        for i in range(count)
    ]


def unlearning_step(method: str, options: argparse.Namespace, folder: str) -> Callable[[], None]:
    own = {n: options.layers // 2 if value == "half" else value for n, value in SETTINGS.get(method, {}).items()}
    args = UnlearningConfig(
        folder, method=method, use_cpu=True, report_to="none", per_device_train_batch_size=options.batch,
        learning_rate=1e-4, max_steps=10_000, **own,
    )  # fmt: skip
    lora = {"init_lora_weights": False} if method == "prune_first" else {}
    model = adapted_model(options.vocabulary, options.hidden, options.layers, **lora)
    if "reinforced_adapter" in own:
        model.add_adapter("reinforced", model.peft_config["default"])
    trainer = UnlearningTrainer(
        model, args,
        forget_dataset=rows("forget", options.batch, options.length),
        retain_dataset=rows("retain", options.batch, options.length), processing_class=tokenizer_of_bytes(),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(options.batch)])
    trainer.create_optimizer()
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)

    def step() -> None:
        trainer.training_step(trainer.model, batch, count)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def plain_step(options: argparse.Namespace) -> Callable[[], None]:
    from hf_transfer_ext.data.forget_retain import ForgetRetainPairs

    model = adapted_model(options.vocabulary, options.hidden, options.layers).train()
    both = rows("forget", options.batch, options.length) + rows("retain", options.batch, options.length)
    pairs = ForgetRetainPairs(both, None, tokenizer_of_bytes())
    batch = forget_retain_collator(256)([pairs[i] for i in range(len(pairs))])["forget"]
    batch.pop("index")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps_of(methods: Sequence[str], options: argparse.Namespace, folder: str) -> dict[str, Callable[[], None]]:
    made = {PLAIN: plain_step(options)} if PLAIN in methods else {}
    return made | {method: unlearning_step(method, options, folder) for method in methods if method != PLAIN}


def growth_of(method: str, options: argparse.Namespace) -> int:
    """Bytes by which the resident memory grows at the peak of a method's third step, in a process of its own.

    The process is forked, which takes no time to import anything; this one must not have run torch before.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_growth_here, (method, options))


def _growth_here(method: str, options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    # Freed blocks of 64 kB and more go back to the system: what one step frees would hide what the next one takes.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    with tempfile.TemporaryDirectory() as folder:
        step = steps_of([method], options, folder)[method]
        step()
        step()
        return measure.measure(step)["growth_bytes"]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float | None]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], metavar="METHOD")
    for name, value in (("rounds", 12), ("batch", 4), ("length", 96), ("hidden", 256), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = {name: getattr(options, name) for name in ("batch", "length", "hidden", "layers", "vocabulary")}
    names = [PLAIN, *options.methods]
    growth = {name: growth_of(name, options) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        steps = steps_of(names, options, folder)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds + 2):
            for name, step in steps.items():
                start = time.process_time()
                step()
                seconds[name].append(time.process_time() - start)
    found: dict[str, dict[str, float | None]] = {
        name: {
            "cpu_s": statistics.median(times[2:]),
            "ratio": statistics.median(t / p for t, p in zip(times[2:], seconds[PLAIN][2:], strict=True)),
            "growth_bytes": growth[name],
            "growth_ratio": growth[name] / growth[PLAIN] if growth[PLAIN] else None,
        }
        for name, times in seconds.items()
    }
    rows = [
        [name, f"{one['cpu_s']:.3f}", f"{one['ratio']:.2f}", f"{growth[name] / 1e6:.0f}",
         None if one["growth_ratio"] is None else f"{one['growth_ratio']:.2f}"]
        for name, one in found.items()
    ]  # fmt: skip
    machine = measure.machine(["torch", "transformers", "peft"])
    facts = sizes | machine | {"threads": 1, "load average": round(os.getloadavg()[0], 1)}
    given = " ".join(argv if argv is not None else sys.argv[1:])
    measure.report_steps(
        "Unlearning steps beside plain fine-tuning on the same tokens, with a LoRA",
        f"python -m benchmarks.unlearning_steps {given}".strip(), options.rounds, facts,
        measure.markdown_table(["step", "CPU seconds", "times plain", "memory growth, MB", "times plain"], rows),
        options.out, {"settings": sizes, "machine": facts, "steps": found},
    )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
