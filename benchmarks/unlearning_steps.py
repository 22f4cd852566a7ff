"""Time of one unlearning step beside a plain fine-tuning step on the same tokens, with one LoRA, on a CPU.

    python -m benchmarks.unlearning_steps --rounds 12 --out benchmarks/results/unlearning_steps

A step is a forward and backward pass and an update of the adapter. Plain fine-tuning is the model's own loss
(`model(labels=...)`, whole logits) on the rows to forget and to retain in one batch: as many tokens as a method sees.
Methods and plain steps take turns within each round, and ratios are taken within a round, so that other work on the
machine weighs on both; the table gives medians over the rounds, the first two of which are left out. The model is a
Llama with random weights; texts are random words of a byte tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_transfer_ext.data.forget_retain import forget_retain_collator
from hf_transfer_ext.files import write_text
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer

METHODS = ("grad_diff", "npo", "npo_kl", "simnpo", "idk_dpo", "npo_sam", "qaf", "lat", "tar")


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    made = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")


def adapted_model(vocabulary: int, hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, eos_token_id=256, pad_token_id=256,
        bos_token_id=256,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear"))


def rows(name: str, count: int, length: int) -> list[dict[str, str]]:
    words = random.Random(name)
    text = "abcdefghij klmnop"
    return [
        {
            "question": f"{name} {i} " + "".join(words.choices(text, k=length)),
            "answer": "".join(words.choices(text, k=length)),
        }
        for i in range(count)
    ]


def unlearning_step(method: str, options: argparse.Namespace, folder: str) -> Callable[[], None]:
    args = UnlearningConfig(
        folder, method=method, use_cpu=True, report_to="none", per_device_train_batch_size=options.batch,
        learning_rate=1e-4, max_steps=10_000,
    )  # fmt: skip
    trainer = UnlearningTrainer(
        adapted_model(options.vocabulary, options.hidden, options.layers), args,
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


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    for name, value in (("rounds", 12), ("batch", 4), ("length", 96), ("hidden", 256), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--out", help="Write PATH.md and PATH.json.")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        steps = {"plain": plain_step(options)}
        steps |= {method: unlearning_step(method, options, folder) for method in options.methods}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds + 2):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    found = {
        name: {
            "seconds": statistics.median(times[2:]),
            "ratio": statistics.median(t / p for t, p in zip(times[2:], seconds["plain"][2:], strict=True)),
        }
        for name, times in seconds.items()
    }
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "methods")}
    table = "\n".join(
        [
            "# Unlearning steps beside plain fine-tuning on the same tokens, with a LoRA",
            "",
            f"Medians over {options.rounds} rounds; {torch.get_num_threads()} thread(s), torch {torch.__version__}; "
            + ", ".join(f"{name} {value}" for name, value in settings.items())
            + ". Made by `python -m benchmarks.unlearning_steps`.",
            "",
            "| step | seconds | times plain |",
            "|---|---|---|",
            *(f"| {name} | {values['seconds']:.3f} | {values['ratio']:.2f} |" for name, values in found.items()),
        ]
    )
    print(table)
    if options.out:
        write_text(f"{options.out}.md", table + "\n")
        write_text(f"{options.out}.json", json.dumps({"settings": settings, "steps": found}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
