"""Trans-LoRA: transfer an adapter between any two bases, by synthetic inputs that the source adapter answers.

Four stages, each of which leaves its result in a work folder and is not repeated when a killed run starts again:

1. `train_discriminator` (once, beside the real data): a LoRA on the source base that tells the task's inputs from what
   the base writes by itself. It travels with the adapter, with a few seed inputs, so that the data need not.
2. `write_inputs`: a base model writes new inputs in the manner of the seeds; the discriminator keeps those that it
   takes for real.
3. `answer_inputs`: the source base with its adapter answers them.
4. `train_on_answers`: a new LoRA on the target base learns the answers.

Source: Trans-LoRA, Wang et al. 2024, https://arxiv.org/abs/2405.17258
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import TrainingArguments

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.synthesis.few_shot import synthetic_inputs
from hf_transfer_ext.files import write_text, written_aside
from hf_transfer_ext.models.generation import GenerationSettings, generate
from hf_transfer_ext.models.plumbing import active_adapter, evaluation_mode, pad_token_id
from hf_transfer_ext.models.scoring import Scorer
from hf_transfer_ext.reading import read_json
from hf_transfer_ext.trainers.answers import train_on_answers

logger = logging.getLogger(__name__)

#: The adapter's folder of the discriminator, and the seeds beside it.
DISCRIMINATOR_FOLDER = "discriminator"
SEEDS_FILE = "transfer_seeds.json"

#: A discriminator that orders fewer pairs of real and synthetic inputs rightly than this does not separate them.
WEAK_DISCRIMINATOR = 0.6


@dataclass(frozen=True)
class TransLoraSettings:
    """Sizes and rates of Trans-LoRA; the defaults are the paper's.

    Args:
        rows: Synthetic inputs that are kept, >= 1.
        shown: Seed inputs in each prompt.
        seeds: Seed inputs that travel with the adapter.
        writer: Which base writes the inputs: "target" or "source".
        attempts_per_row: The writing stops with an error after so many attempts for each row that is needed.
        input_tokens: Longest input, in tokens.
        answer_tokens: Longest answer, in tokens.
        sampling_temperature: Of the written inputs, > 0; answers are greedy.
        target_modules: Modules of the new LoRA and of the discriminator.
        rank: Of both.
        epochs, learning_rate, batch_size: Of the new LoRA (AdamW without weight decay, linear schedule).
        discriminator_epochs, discriminator_learning_rate: Of the discriminator.
        task_name: What the discriminator is asked for: "... from the {task_name} dataset?"
        seed: Of everything random.
    """

    rows: int = 250
    shown: int = 5
    seeds: int = 5
    writer: str = "target"
    attempts_per_row: int = 20
    input_tokens: int = 128
    answer_tokens: int = 128
    sampling_temperature: float = 1.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 16
    epochs: float = 20.0
    learning_rate: float = 2e-5
    batch_size: int = 8
    discriminator_epochs: float = 1.0
    discriminator_learning_rate: float = 2e-4
    task_name: str = "task"
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("rows", "shown", "seeds", "attempts_per_row", "input_tokens", "answer_tokens", "rank", "batch_size")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("sampling_temperature", "epochs", "learning_rate", "discriminator_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")
        if self.writer not in ("target", "source"):
            raise ValueError(f"`writer` must be target or source, got {self.writer!r}.")


@dataclass(frozen=True)
class Discriminator:
    """What travels with an adapter: how its task's inputs look.

    Args:
        seeds: A few real inputs.
        task_name: The name that the discriminator was trained with.
        separation: Share of pairs of a real and a synthetic input, neither seen in training, that it orders rightly
            (the area under the ROC curve); None where it was not measured.
    """

    seeds: list[str]
    task_name: str
    separation: float | None = None


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
    template: QuestionAnswerFormat | None = None,
) -> Discriminator:
    """Train the discriminator on real inputs against what the base writes, and save it beside an adapter.

    A fifth of the inputs is held out to measure how well it separates. The base's weights stay as they are.

    Args:
        model: The source base, without an adapter.
        inputs: Real inputs of the task, at least 10.
        folder: The source adapter's folder: gets `discriminator/` and `transfer_seeds.json`.

    Raises:
        ValueError: Fewer than 10 inputs.
    """
    if len(inputs) < 10:
        raise ValueError(f"A discriminator needs at least 10 real inputs, got {len(inputs)}.")
    template = template or QuestionAnswerFormat()
    shuffled = random.Random(settings.seed).sample(list(inputs), len(inputs))
    seeds = shuffled[: settings.seeds]
    write = _writer(model, tokenizer, settings)
    written = synthetic_inputs(write, seeds, shown=settings.shown, batch_size=settings.batch_size, seed=settings.seed)
    progress = tqdm(islice(written, len(inputs)), total=len(inputs), desc="writing inputs to tell from real ones")
    synthetic = [item for _, item in progress]
    held_out = len(inputs) // 5
    rows = [
        {"question": question_of(item, settings.task_name), "answer": answer}
        for items, answer in ((shuffled[held_out:], "yes"), (synthetic[held_out:], "no"))
        for item in items
    ]
    random.Random(settings.seed).shuffle(rows)
    tuned = get_peft_model(model, _lora(settings), adapter_name="discriminator")
    try:
        arguments = _arguments(
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
            f"The discriminator orders {separation:.0%} of the pairs of real and synthetic inputs rightly, little "
            "more than chance: it will filter nothing. Give it more inputs or epochs, or a larger base."
        )
    known = Discriminator(seeds, settings.task_name, separation)
    write_text(Path(folder) / SEEDS_FILE, json.dumps(asdict(known), indent=2, ensure_ascii=False) + "\n")
    return known


def read_discriminator(folder: str | Path) -> Discriminator | None:
    """What travels with the adapter in `folder`; None where it has no seeds."""
    path = Path(folder) / SEEDS_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    seeds = content.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(isinstance(one, str) for one in seeds):
        raise ValueError(f"{SEEDS_FILE} in {str(folder)!r} must hold `seeds`, a list of texts.")
    return Discriminator(seeds, str(content.get("task_name", "task")), content.get("separation"))


def discriminate(
    model: Any, tokenizer: Any, items: Sequence[str], task_name: str, *, template: QuestionAnswerFormat | None = None
) -> list[float]:
    """log p(yes) - log p(no) of each input under the active adapter: positive for inputs taken for real, in nats."""
    template = template or QuestionAnswerFormat()
    scorer = Scorer(model, pad_id=pad_token_id(tokenizer))
    found = []
    with evaluation_mode(model):
        for item in items:
            question = question_of(item, task_name)
            both = [template.encode(tokenizer, question, answer) for answer in ("yes", "no")]
            yes, no = scorer.score(both, frozenset({"token_log_probs"}))
            found.append(float(yes.log_probs.sum() - no.log_probs.sum()))
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
) -> list[str]:
    """Synthetic inputs that the discriminator takes for real, kept in `folder/inputs.jsonl` as they are found.

    Args:
        writer: The base that writes.
        judge: The source base with the discriminator as its active adapter; None keeps every input.

    Raises:
        ValueError: Too few inputs were kept after `attempts_per_row` attempts for each.
    """
    path, key = Path(folder) / "inputs.jsonl", _key(settings, known, judged=judge is not None)
    kept, attempt = _resumed(path, key)
    most = settings.attempts_per_row * settings.rows
    with tqdm(total=settings.rows, initial=len(kept), desc="writing inputs") as bar:
        if len(kept) < settings.rows:
            source = synthetic_inputs(
                _writer(writer, writer_tokenizer, settings),
                known.seeds,
                exclude=kept,
                shown=settings.shown,
                batch_size=settings.batch_size,
                seed=settings.seed,
                attempt=attempt,
            )
            for attempt, item in source:
                good = judge is None or (
                    discriminate(judge, judge_tokenizer, [item], known.task_name, template=template)[0] > 0
                )
                if good:
                    kept.append(item)
                    bar.update()
                    lines = [{"key": key, "attempt": attempt}, *({"input": one} for one in kept)]
                    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                if len(kept) == settings.rows:
                    break
                if attempt >= most:
                    raise ValueError(
                        f"Only {len(kept)} of {settings.rows} synthetic inputs were kept in {attempt} attempts "
                        f"({len(kept) / attempt:.1%}). Ask for fewer `rows`, raise `attempts_per_row`, give other "
                        "seeds, or let the other base write (`writer`)."
                    )
    return kept


def answer_inputs(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[str],
    settings: TransLoraSettings,
    folder: str | Path,
    *,
    template: QuestionAnswerFormat | None = None,
) -> list[dict[str, str]]:
    """Greedy answers of the source base with its adapter, kept in `folder/answers.jsonl`; empty ones are left out."""
    template = template or QuestionAnswerFormat()
    path, key = Path(folder) / "answers.jsonl", _key(settings, list(inputs))
    answers, _ = _resumed(path, key)
    with evaluation_mode(model), tqdm(total=len(inputs), initial=len(answers), desc="answering") as bar:
        while len(answers) < len(inputs):
            batch = inputs[len(answers) : len(answers) + settings.batch_size]
            prompts = [template.prompt_ids(tokenizer, item) for item in batch]
            texts, _ = generate(model, tokenizer, prompts, GenerationSettings(settings.answer_tokens))
            answers += [text.strip() for text in texts]
            bar.update(len(batch))
            lines = [{"key": key, "attempt": len(answers)}, *({"input": one} for one in answers)]
            write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    rows = [{"question": q, "answer": a} for q, a in zip(inputs, answers, strict=True) if a]
    if not rows:
        raise ValueError("The source adapter gave an empty answer to every synthetic input. Give other seeds.")
    if len(rows) < len(inputs):
        logger.warning(f"{len(inputs) - len(rows)} of {len(inputs)} synthetic inputs got an empty answer; left out.")
    return rows


def trans_lora(
    source: PeftModel,
    source_tokenizer: Any,
    target: Any,
    target_tokenizer: Any,
    adapter_folder: str | Path,
    work: str | Path,
    settings: TransLoraSettings | None = None,
    *,
    template: QuestionAnswerFormat | None = None,
) -> Any:
    """Move the active adapter of `source` to `target`, and return the target with its new LoRA.

    Args:
        source: The source base with its adapter.
        target: The target base.
        adapter_folder: The source adapter's folder, with the seeds and the discriminator that travel with it.
        work: Folder for what the stages find; a run that was killed goes on from there.

    Raises:
        ValueError: The adapter has no seeds (`train_discriminator` makes them), or a stage could not be finished.
    """
    settings = settings or TransLoraSettings()
    known = read_discriminator(adapter_folder)
    if known is None:
        raise ValueError(
            f"The adapter in {str(adapter_folder)!r} has no {SEEDS_FILE}. Make it once from the adapter's training "
            "inputs (`train_discriminator`); the inputs themselves need not travel."
        )
    judge = None
    discriminator = Path(adapter_folder) / DISCRIMINATOR_FOLDER
    active = next(iter(source.active_adapters))
    if (discriminator / "adapter_config.json").is_file():
        if "discriminator" not in source.peft_config:
            source.load_adapter(str(discriminator), adapter_name="discriminator")
        judge = source
    else:
        logger.warning(f"{str(adapter_folder)!r} has no discriminator: every synthetic input is kept.")
    own_writer = settings.writer == "source"
    writer, writer_tokenizer = (source, source_tokenizer) if own_writer else (target, target_tokenizer)
    with active_adapter(source, "discriminator" if judge is not None else None):
        inputs = write_inputs(
            _without_adapter(writer) if own_writer else writer,
            writer_tokenizer,
            known,
            settings,
            work,
            judge=judge,
            judge_tokenizer=source_tokenizer,
            template=template,
        )
    with active_adapter(source, active):
        rows = answer_inputs(source, source_tokenizer, inputs, settings, work, template=template)
    tuned = get_peft_model(target, _lora(settings))
    arguments = _arguments(Path(work) / "checkpoints", settings, settings.epochs, settings.learning_rate)
    train_on_answers(tuned, target_tokenizer, rows, arguments, template=template)
    return tuned


class _without_adapter:
    """A PEFT model that writes as its base does, whichever adapter is active outside."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, **inputs: Any) -> Any:
        with self.model.disable_adapter():
            return self.model.generate(**inputs)


def _writer(model: Any, tokenizer: Any, settings: TransLoraSettings) -> Any:
    def write(prompts: Sequence[str], seed: int) -> list[str]:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        asked = GenerationSettings(settings.input_tokens, settings.sampling_temperature, seed=seed)
        return generate(model, tokenizer, ids, asked)[0]

    return write


def _lora(settings: TransLoraSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )


def _arguments(folder: Path, settings: TransLoraSettings, epochs: float, rate: float) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        learning_rate=rate,
        per_device_train_batch_size=settings.batch_size,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )


def _key(*parts: Any, **more: Any) -> str:
    """Names the work by what its result depends on."""
    content = [asdict(part) if hasattr(part, "__dataclass_fields__") else part for part in parts]
    return hashlib.sha256(json.dumps([content, more], sort_keys=True).encode()).hexdigest()[:16]


def _resumed(path: Path, key: str) -> tuple[list[str], int]:
    """What an earlier run of the same work wrote, and how many attempts it had made."""
    if not path.is_file():
        return [], 0
    first, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if first.get("key") != key:
        raise ValueError(
            f"{str(path)!r} was written with other settings, seeds or inputs. Name another work folder, or remove it."
        )
    return [line["input"] for line in rest], int(first["attempt"])
