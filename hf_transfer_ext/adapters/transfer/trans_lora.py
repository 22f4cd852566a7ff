"""Trans-LoRA: the stages that turn an adapter into training data for another base.

1. `train_discriminator` (once, where the real data is): a LoRA on the source base that tells the task's inputs from
   what the base writes by itself. It is saved with the adapter, with a few seed inputs, so that the data itself is not
   needed later.
2. `write_inputs`: a base model writes new inputs in the style of the seeds; the discriminator keeps those that it
   classifies as real.
3. `answer_inputs`: the source base with its adapter answers them.

`by_training.transfer_by_training` runs stages 2 and 3 and trains the new LoRA on the answers. Each stage saves its
progress in a work folder, so an interrupted run continues where it stopped.

When to use it: between unrelated bases, or wherever the closed forms lose too much. It needs both bases, a few example
inputs, and minutes to hours of generation and training, but neither the original data nor a shared tokenizer.

Source: Trans-LoRA, Wang et al. 2024, https://arxiv.org/abs/2405.17258
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from hf_transfer_ext.adapters.transfer.travel import DISCRIMINATOR_FOLDER, SEEDS_FILE
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.synthesis.few_shot import synthetic_inputs
from hf_transfer_ext.files import write_text, written_aside
from hf_transfer_ext.models.generation import GenerationSettings, generate
from hf_transfer_ext.models.plumbing import evaluation_mode, pad_token_id
from hf_transfer_ext.models.scoring import Scorer
from hf_transfer_ext.progress import stage, steps
from hf_transfer_ext.reading import read_json
from hf_transfer_ext.trainers.answers import train_on_answers
from hf_transfer_ext.trainers.logs import require_reporters

logger = logging.getLogger(__name__)

#: Real inputs that a discriminator needs at least.
FEWEST_INPUTS = 10

#: Metadata of settings that have no part in the result.
NO_PART = {"part_of_result": False}

#: A discriminator that ranks a smaller share of the pairs of a real and a synthetic input correctly is of no use.
WEAK_DISCRIMINATOR = 0.6


@dataclass(frozen=True)
class TransLoraSettings:
    """Sizes and rates of Trans-LoRA; the defaults are the paper's.

    Args:
        rows: Number of synthetic inputs, >= 1.
        shown: Seed inputs in each prompt.
        seeds: Seed inputs that are saved with the adapter.
        writer: Which base writes the inputs: "target" or "source".
        attempts_per_row: Stop with an error after this many attempts for each of `rows`.
        input_tokens: Longest input, in tokens.
        answer_tokens: Longest answer, in tokens.
        sampling_temperature: Of the written inputs, > 0; answers are greedy.
        target_modules: Modules of the new LoRA and of the discriminator.
        rank: Of both.
        epochs, learning_rate, batch_size: Of the new LoRA (AdamW without weight decay, linear schedule).
        discriminator_epochs, discriminator_learning_rate: Of the discriminator.
        task_name: Name of the task in the discriminator's question: "... from the {task_name} dataset?"
        seed: Of everything random.
        bf16: Compute the training passes in bfloat16 (autocast). The trained weights are float32 either way; the base
            is in the `dtype` that it was loaded in.
        report_to: Where the trainings report to beside their log lines: tensorboard, trackio, wandb, ..., or a list of
            these. It has no part in the result: a run goes on from stages that were computed under another one.
        logging_steps: Optimizer steps between two log lines, >= 1; the same holds.
    """

    rows: int = 250
    shown: int = 5
    seeds: int = 5
    writer: str = "target"
    attempts_per_row: int = 20
    input_tokens: int = 128
    answer_tokens: int = 128
    sampling_temperature: float = 1.0
    target_modules: tuple[str, ...] | list[str] = ("q_proj", "v_proj")
    rank: int = 16
    epochs: float = 20.0
    learning_rate: float = 2e-5
    batch_size: int = 8
    discriminator_epochs: float = 1.0
    discriminator_learning_rate: float = 2e-4
    task_name: str = "task"
    seed: int = 0
    bf16: bool = False
    report_to: str | list[str] = field(default="none", metadata=NO_PART)
    logging_steps: int = field(default=10, metadata=NO_PART)

    def __post_init__(self) -> None:
        require_reporters(self.report_to)
        whole = ("rows", "shown", "seeds", "attempts_per_row", "input_tokens", "answer_tokens", "rank", "batch_size")
        for name in (*whole, "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("sampling_temperature", "epochs", "learning_rate", "discriminator_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")
        if self.writer not in ("target", "source"):
            raise ValueError(f"`writer` must be target or source, got {self.writer!r}.")


@dataclass(frozen=True)
class Discriminator:
    """What is saved with an adapter so that it can be transferred: examples of its task's inputs.

    Args:
        seeds: A few real inputs.
        task_name: The name that the discriminator was trained with.
        separation: Share of pairs of a real and a synthetic input, neither seen in training, that it ranks correctly
            (the area under the ROC curve); None where it was not measured.
        threshold: An input is accepted where log p(yes) - log p(no) is greater, in nats. The paper's is 0. A
            discriminator that was trained briefly may answer "no" (or "yes") to everything and still rank the inputs
            well; so the threshold is the one that classifies the held-out inputs best, and 0 where that is as good.
    """

    seeds: list[str]
    task_name: str
    separation: float | None = None
    threshold: float = 0.0


def question_of(item: str, task_name: str) -> str:
    """The discriminator's question about one input, in the words of the paper."""
    return f"Answer in as few words as possible. {item} Is the above question from the {task_name} dataset?"


def train_discriminator(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[str],
    folder: str | Path,
    settings: TransLoraSettings,
    *,
    seeds: Sequence[str] | None = None,
    template: QuestionAnswerFormat | None = None,
) -> Discriminator:
    """Train the discriminator on real inputs against what the base writes, and save it next to an adapter.

    A fifth of the inputs is held out to measure how well it separates them. The base's weights do not change.

    Args:
        model: The source base, without an adapter.
        inputs: Real inputs of the task, at least `FEWEST_INPUTS`.
        folder: The source adapter's folder, to which `discriminator/` and `transfer_seeds.json` are written.
        seeds: The seed inputs; by default `settings.seeds` of the inputs.

    Raises:
        ValueError: Too few inputs, or a base that writes too few different inputs to train against.
    """
    if len(inputs) < FEWEST_INPUTS:
        raise ValueError(f"A discriminator needs at least {FEWEST_INPUTS} real inputs, got {len(inputs)}.")
    template = template or QuestionAnswerFormat()
    shuffled = random.Random(settings.seed).sample(list(inputs), len(inputs))
    seeds = shuffled[: settings.seeds] if seeds is None else list(seeds)
    most = settings.attempts_per_row * len(inputs)
    written = _synthetic(model, tokenizer, seeds, settings, attempts=most)
    counted = steps(islice(written, len(inputs)), "writing counterexamples", "text", total=len(inputs))
    synthetic = [item for _, item in counted]
    if len(synthetic) < FEWEST_INPUTS:
        raise ValueError(
            f"The base wrote only {len(synthetic)} different inputs in {most} attempts; "
            f"a discriminator needs at least {FEWEST_INPUTS}. Raise `input_tokens` or `sampling_temperature`, or give "
            "other seeds."
        )
    held_out = min(len(inputs), len(synthetic)) // 5
    rows = [
        {"question": question_of(item, settings.task_name), "answer": answer}
        for items, answer in ((shuffled[held_out:], "yes"), (synthetic[held_out:], "no"))
        for item in items
    ]
    random.Random(settings.seed).shuffle(rows)
    tuned = new_lora(model, settings, DISCRIMINATOR_FOLDER)
    try:
        arguments = training_arguments(
            Path(folder) / ".training", settings, settings.discriminator_epochs, settings.discriminator_learning_rate
        )
        train_on_answers(tuned, tokenizer, rows, arguments, template=template)
        held = [*shuffled[:held_out], *synthetic[:held_out]]
        found = discriminate(tuned, tokenizer, held, settings.task_name, template=template)
        real, fake = found[:held_out], found[held_out:]
        separation = sum((a > b) + 0.5 * (a == b) for a in real for b in fake) / (len(real) * len(fake))
        with written_aside(Path(folder) / DISCRIMINATOR_FOLDER, overwrite=True) as aside:
            tuned.save_pretrained(str(aside), selected_adapters=["discriminator"])
            for file in (aside / "discriminator").iterdir():  # PEFT gives a named adapter a folder of its own
                file.rename(aside / file.name)
            (aside / "discriminator").rmdir()
    finally:
        tuned.unload()
    if separation < WEAK_DISCRIMINATOR:
        logger.warning(
            f"The discriminator ranks only {separation:.0%} of the pairs of a real and a synthetic input correctly, "
            "little more than chance: it will filter nothing. Give it more inputs or epochs, or use a larger base."
        )
    return _save_seeds(folder, Discriminator(seeds, settings.task_name, separation, best_threshold(real, fake)))


def best_threshold(real: Sequence[float], synthetic: Sequence[float]) -> float:
    """The threshold above which the most real and the fewest synthetic scores lie; 0 where it is one of the best.

    Of several equally good ones it is the one next to 0. Both groups count the same, whatever their sizes. Where no
    threshold is better than chance, the result accepts everything.
    """

    def correct(threshold: float) -> float:
        above = [sum(score > threshold for score in scores) / len(scores) for scores in (real, synthetic)]
        return above[0] - above[1]

    scores = sorted({*real, *synthetic})
    between = [(one + other) / 2 for one, other in itertools.pairwise(scores)]
    best = min([0.0, *between], key=lambda one: (-round(correct(one), 9), abs(one)))
    return best if correct(best) > 0 else scores[0] - 1.0


def save_seeds(inputs: Sequence[str], folder: str | Path, settings: TransLoraSettings) -> Discriminator:
    """Save seed inputs next to an adapter without a discriminator: a transfer then accepts every written input.

    Args:
        inputs: Real inputs of the task, of which `settings.seeds` are drawn.
        folder: The source adapter's folder.
    """
    chosen = random.Random(settings.seed).sample(list(inputs), min(settings.seeds, len(inputs)))
    return _save_seeds(folder, Discriminator(chosen, settings.task_name))


def _save_seeds(folder: str | Path, known: Discriminator) -> Discriminator:
    write_text(Path(folder) / SEEDS_FILE, json.dumps(asdict(known), indent=2, ensure_ascii=False) + "\n")
    return known


def read_discriminator(folder: str | Path) -> Discriminator | None:
    """The seeds that were saved with the adapter in `folder`; None where it has none."""
    path = Path(folder) / SEEDS_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    seeds = content.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(isinstance(one, str) for one in seeds):
        raise ValueError(f"{SEEDS_FILE} in {str(folder)!r} must hold `seeds`, a list of texts.")
    threshold = float(content.get("threshold", 0.0))
    return Discriminator(seeds, str(content.get("task_name", "task")), content.get("separation"), threshold)


def discriminate(
    model: Any,
    tokenizer: Any,
    items: Sequence[str],
    task_name: str,
    *,
    template: QuestionAnswerFormat | None = None,
    batch_size: int = 16,
) -> list[float]:
    """log p(yes) - log p(no) of each input under the active adapter, in nats: the greater, the more it looks real."""
    template = template or QuestionAnswerFormat()
    scorer = Scorer(model, pad_id=pad_token_id(tokenizer))
    found: list[float] = []
    with evaluation_mode(model):
        for first in range(0, len(items), batch_size):
            encoded = [
                template.encode(tokenizer, question_of(item, task_name), answer)
                for item in items[first : first + batch_size]
                for answer in ("yes", "no")
            ]
            scores = [float(one.log_probs.sum()) for one in scorer.score(encoded, frozenset({"token_log_probs"}))]
            found += [yes - no for yes, no in zip(scores[::2], scores[1::2], strict=True)]
    return found


def write_inputs(
    writer: Any,
    writer_tokenizer: Any,
    known: Discriminator,
    settings: TransLoraSettings,
    folder: str | Path,
    *,
    judge: Any = None,
    judge_tokenizer: Any = None,
    template: QuestionAnswerFormat | None = None,
) -> tuple[list[str], int]:
    """Synthetic inputs that the discriminator classifies as real, saved in `folder/inputs.jsonl` as they are found.

    Args:
        writer: The base that writes.
        judge: The source base with the discriminator as its active adapter; None accepts every input.

    Returns:
        The accepted inputs, and the number of attempts that they took.

    Raises:
        ValueError: Too few inputs were accepted after `attempts_per_row` attempts for each.
    """
    path, key = Path(folder) / "inputs.jsonl", work_key(settings, known, judged=judge is not None)
    kept, attempt = _resumed(path, key)
    most = settings.attempts_per_row * settings.rows
    written = _synthetic(writer, writer_tokenizer, known.seeds, settings, attempts=most, exclude=kept, attempt=attempt)
    with stage("writing inputs", settings.rows, "text", done=len(kept)) as advance:
        while len(kept) < settings.rows:
            batch = list(islice(written, settings.batch_size))
            if not batch:
                raise ValueError(
                    f"Only {len(kept)} of {settings.rows} synthetic inputs were accepted in {most} attempts "
                    f"({len(kept) / most:.1%}). Ask for fewer `rows`, raise `attempts_per_row`, give other seeds, or "
                    "let the other base write (`writer`)."
                )
            items = [item for _, item in batch]
            scores = [math.inf] * len(items)
            if judge is not None:
                scores = discriminate(judge, judge_tokenizer, items, known.task_name, template=template)
            attempt = batch[-1][0]
            for item, score in zip(items, scores, strict=True):
                if score > known.threshold and len(kept) < settings.rows:
                    kept.append(item)
                    advance(1)
            _save(path, key, attempt, kept)
    return kept, attempt


def answer_inputs(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[str],
    settings: TransLoraSettings,
    folder: str | Path,
    *,
    template: QuestionAnswerFormat | None = None,
) -> list[dict[str, str]]:
    """Greedy answers of the source base with its adapter, saved in `folder/answers.jsonl`; empty ones are dropped.

    Returns:
        Rows with `question` and `answer`.

    Raises:
        ValueError: Every answer is empty.
    """
    template = template or QuestionAnswerFormat()
    path, key = Path(folder) / "answers.jsonl", work_key(settings, list(inputs))
    answers, _ = _resumed(path, key)
    with evaluation_mode(model), stage("answering the inputs", len(inputs), "text", done=len(answers)) as advance:
        while len(answers) < len(inputs):
            batch = inputs[len(answers) : len(answers) + settings.batch_size]
            prompts = [template.prompt_ids(tokenizer, item) for item in batch]
            texts, _ = generate(model, tokenizer, prompts, GenerationSettings(settings.answer_tokens))
            answers += [text.strip() for text in texts]
            advance(len(batch))
            _save(path, key, len(answers), answers)
    rows = [{"question": q, "answer": a} for q, a in zip(inputs, answers, strict=True) if a]
    if not rows:
        raise ValueError("The source adapter gave an empty answer to every synthetic input. Give other seeds.")
    if len(rows) < len(inputs):
        logger.warning(f"{len(inputs) - len(rows)} of {len(inputs)} synthetic inputs got an empty answer; left out.")
    return rows


def _synthetic(
    model: Any, tokenizer: Any, seeds: Sequence[str], settings: TransLoraSettings, **options: Any
) -> Iterator[tuple[int, str]]:
    def write(prompts: Sequence[str], seed: int) -> list[str]:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        sampling = GenerationSettings(settings.input_tokens, settings.sampling_temperature, seed=seed)
        return generate(model, tokenizer, ids, sampling)[0]

    return synthetic_inputs(
        write, seeds, shown=settings.shown, batch_size=settings.batch_size, seed=settings.seed, **options
    )


def new_lora(model: Any, settings: TransLoraSettings, name: str = "default") -> PeftModel:
    """The model with a fresh LoRA, whose first factors are drawn from the settings' seed."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(model, config, adapter_name=name)


def training_arguments(
    folder: Path, settings: TransLoraSettings, epochs: float, rate: float, **more: Any
) -> TrainingArguments:
    """Those of the paper: AdamW without weight decay, on a linear schedule."""
    fixed = {"lr_scheduler_type": "linear", "weight_decay": 0.0, **shared_arguments(settings)}
    return TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        learning_rate=rate,
        **{"save_strategy": "no", **fixed, **more},
    )


def shared_arguments(settings: TransLoraSettings) -> dict[str, Any]:
    """Arguments of every training here, whether it learns answers or logits."""
    return {
        "seed": settings.seed, "per_device_train_batch_size": settings.batch_size, "bf16": settings.bf16,
        "report_to": settings.report_to, "logging_steps": settings.logging_steps,
        "use_cpu": settings.bf16 and not torch.accelerator.is_available(),  # which transformers asks for with bf16
    }  # fmt: skip


def work_key(*parts: Any, **more: Any) -> str:
    """A digest of everything that the result of a stage depends on."""
    content = [result_settings(part) if is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps([content, more], sort_keys=True).encode()).hexdigest()[:16]


def result_settings(settings: Any) -> dict[str, Any]:
    """The fields of settings that have a part in the result."""
    return {
        one.name: getattr(settings, one.name) for one in fields(settings) if one.metadata.get("part_of_result", True)
    }


def _resumed(path: Path, key: str) -> tuple[list[str], int]:
    """The texts that an earlier run of the same work saved, and how many attempts it had made."""
    if not path.is_file():
        return [], 0
    first, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if first.get("key") != key:
        raise ValueError(
            f"{str(path)!r} was written with other settings, seeds or inputs. Name another work folder, or remove it."
        )
    return [line["input"] for line in rest], int(first["attempt"])


def _save(path: Path, key: str, attempt: int, texts: Sequence[str]) -> None:
    lines = [{"key": key, "attempt": attempt}, *({"input": one} for one in texts)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
