"""Transfer by training: from an adapter folder and a new base to an adapter folder, through the stages of Trans-LoRA.

When to use it: between unrelated bases, other tokenizers included, or wherever a closed form loses too much.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from hf_transfer_ext.adapters.finish import finish_adapter
from hf_transfer_ext.adapters.transfer.methods import TRANSFER_METHODS
from hf_transfer_ext.adapters.transfer.run import transfer_lora
from hf_transfer_ext.adapters.transfer.trans_lora import (
    FEWEST_INPUTS,
    Discriminator,
    TransLoraSettings,
    answer_inputs,
    new_lora,
    read_discriminator,
    shared_arguments,
    train_discriminator,
    training_arguments,
    work_key,
    write_inputs,
)
from hf_transfer_ext.adapters.transfer.travel import (
    DISCRIMINATOR_FOLDER,
    NOT_COMPARED,
    SEEDS_FILE,
    TRANSFER_FILE,
    copy_seeds,
    inputs_of_transfer,
    origin,
    refuse_other_base,
)
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.adapters import with_adapters
from hf_transfer_ext.files import refuse_existing_output, sha256_of, write_text, written_aside
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.models.plumbing import BASE, active_adapter
from hf_transfer_ext.trainers.answers import train_on_answers
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
from hf_transfer_ext.trainers.logs import drawn, plot_in
from hf_transfer_ext.trainers.saving import last_checkpoint
from hf_transfer_ext.weights.reference import ModelReference, parse_reference
from hf_transfer_ext.weights.repository import base_of_adapter, local_folder

logger = logging.getLogger(__name__)

#: How the new adapter learns: from the answers' text, or from the source's logits on it.
LEARN = ("answers", "logits")
#: What the new adapter gets as its discriminator.
DISCRIMINATORS = ("retrain", "copy", "none")


@dataclass(frozen=True)
class TrainedTransferReport:
    """The result of a transfer by training.

    Args:
        rows: Synthetic inputs that were answered and learned.
        acceptance: Share of the written inputs that the discriminator accepted; 1 without a discriminator.
        separation: How well the new adapter's discriminator separates real from synthetic inputs (area under the ROC
            curve); None where it was not retrained.
        hops: Transfers between the adapter that was trained on data and this one.
        seconds: Wall time of this call; of a resumed run the last part only.
    """

    folder: str
    rows: int
    acceptance: float
    separation: float | None
    hops: int
    seconds: float


def transfer_by_training(
    adapter: str | Path,
    target_base: str | Path,
    out: str | Path,
    *,
    source_base: str | Path | None = None,
    settings: TransLoraSettings | None = None,
    template: QuestionAnswerFormat | None = None,
    learn: str = "answers",
    start: str | None = None,
    discriminator: str = "retrain",
    dtype: str = "auto",
    work: str | Path | None = None,
    overwrite: bool = False,
) -> TrainedTransferReport:
    """Train a LoRA on the target base to answer as the source base does with its adapter.

    Inputs are written by a base model from the seeds that were saved with the adapter, filtered by its discriminator,
    and answered by the source (`trans_lora.py`); the new LoRA learns the answers. Every stage saves its progress in
    the work folder, so the same call continues an interrupted run.

    The new folder is a plain PEFT LoRA. It also holds the seeds, a discriminator and `transfer.json` (method,
    settings, the adapter and both bases with their revisions, and earlier transfers), so that it can be the source of
    the next transfer.

    When to use it: first, where the bases are unrelated: it needs both models and the adapter's seeds, and none of
    the data it was trained on.

    Args:
        adapter: Folder or Hub id of the source adapter, with the seeds (and usually the discriminator) that
            `train_discriminator` saves.
        target_base: Folder or Hub id of the new base.
        out: Folder of the new adapter, written atomically.
        source_base: The source base; by default the one that the adapter's config names.
        learn: "answers" trains on the answers' text, for any two tokenizers. "logits" minimizes the forward KL from
            the source's distribution at each token of the answers; both bases need the same vocabulary.
        start: Name of a closed form (`TRANSFER_METHODS`) whose result the LoRA starts from instead of zero. It needs
            no texts: closed forms that read activations are refused.
        discriminator: What is saved for the next transfer: "retrain" trains a discriminator on the target base, with
            the accepted inputs as positives; "copy" keeps the old one, which needs its own base to be available;
            "none" saves the seeds alone.
        dtype: Of both bases: "auto", "float32", "bfloat16" or "float16". LoRA weights are trained in float32.
        work: Folder of the stages; by default `out` with `.transfer` added to its name, and removed at the end.
        overwrite: Replace an adapter that is in `out`.

    Raises:
        ValueError: The adapter has no seeds, does not fit its base, or a setting cannot be used with these models; a
            stage that cannot be finished (no accepted inputs, only empty answers).
    """
    began = time.perf_counter()
    settings = settings or TransLoraSettings()
    if learn not in LEARN:
        raise ValueError(f"`learn` must be one of {', '.join(LEARN)}, got {learn!r}.")
    if discriminator not in DISCRIMINATORS:
        raise ValueError(f"`discriminator` must be one of {', '.join(DISCRIMINATORS)}, got {discriminator!r}.")
    if start is not None and "activations" in TRANSFER_METHODS[start].needs:
        raise ValueError(
            f"`start={start!r}` reads texts with both models, which are not given here. Use `transfer_lora` with "
            "texts and `train_lora` from its result, or another closed form."
        )
    if discriminator == "retrain" and settings.rows < FEWEST_INPUTS:
        raise ValueError(
            f"Retraining the discriminator needs at least {FEWEST_INPUTS} synthetic inputs, and `rows` is "
            f"{settings.rows}. Raise `rows`, or set `discriminator` to copy or none."
        )
    folder = local_folder(adapter)
    known = read_discriminator(folder)
    if known is None:
        raise ValueError(
            f"The adapter {str(adapter)!r} has no {SEEDS_FILE}. Create it once from the adapter's training inputs "
            "(`train_discriminator`); the inputs themselves are not needed afterwards."
        )
    refuse_existing_output(out, overwrite=overwrite, inputs=[adapter, source_base, target_base])
    stages = Path(work) if work is not None else Path(f"{out}.transfer")
    stages.mkdir(parents=True, exist_ok=True)
    source_reference = parse_reference(source_base, "source_base") if source_base else _base_reference(folder)
    target_reference = parse_reference(target_base, "target_base")
    refuse_other_base(folder, source_reference)
    source_tokenizer, target_tokenizer = (_tokenizer(one) for one in (source_reference, target_reference))
    if learn == "logits" and source_tokenizer.get_vocab() != target_tokenizer.get_vocab():
        raise ValueError(
            f"`learn='logits'` needs one vocabulary, and those of {str(source_reference)!r} and "
            f"{str(target_reference)!r} differ. Use learn='answers'."
        )

    base = load_base(source_reference, dtype)
    source, names = with_adapters(base, [folder])
    task = next(name for name in names if name != "base")
    inputs, attempts, judged = _inputs(
        folder, known, source, source_tokenizer, source_reference, target_reference, target_tokenizer, settings,
        stages, template, dtype,
    )  # fmt: skip
    with active_adapter(source, task):
        rows = answer_inputs(source, source_tokenizer, inputs, settings, stages, template=template)
    if learn == "answers":
        del base, source
        gc.collect()
    first = None
    if start is not None:
        first = stages / f"start-{start}"
        if not (first / "adapter_config.json").is_file():
            transfer_lora(folder, target_base, first, method=start, source_base=source_base)
    with written_aside(out, overwrite=overwrite, inputs=[adapter, source_base, target_base, stages]) as aside:
        tuned = train_lora(
            target_reference, target_tokenizer, rows, stages, settings, template=template, start=first, dtype=dtype,
            teacher=source if learn == "logits" else None, name=f"{learn}-{start}",
        )  # fmt: skip
        save_adapter(tuned, aside, target_reference)
        separation = None
        if discriminator == "retrain":
            plain = tuned.unload()
            separation = _retrained(plain, target_tokenizer, inputs, known, settings, stages, aside, template)
        else:
            copy_seeds(folder, aside, with_discriminator=discriminator == "copy")
        history = origin(adapter, source_reference, target_reference, folder)
        content = {
            "method": "trans_lora",
            "learn": learn,
            "start": start,
            "settings": asdict(settings),
            "rows": len(rows),
            "acceptance": len(inputs) / attempts,
            "filtered": judged,
            "discriminator": discriminator,
            **history,
        }
        write_text(aside / TRANSFER_FILE, json.dumps(content, indent=2) + "\n")
        told = {name: content[name] for name in ("method", "learn", "start", "settings", "discriminator")}
        finish_adapter(
            aside, "transfer", "transfer", told, inputs_of_transfer(adapter, source_reference, target_reference),
            recipe_sha256=sha256_of(__file__), seconds=time.perf_counter() - began, not_measured=[NOT_COMPARED],
            seed=settings.seed, files=plot_in(stages),
        )  # fmt: skip
    if work is None:
        shutil.rmtree(stages)
    return TrainedTransferReport(
        str(out),
        len(rows),
        len(inputs) / attempts,
        separation,
        len(history["earlier_transfers"]) + 1,
        time.perf_counter() - began,
    )


def train_lora(
    base: str | Path | ModelReference,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    work: str | Path,
    settings: TransLoraSettings,
    *,
    template: QuestionAnswerFormat | None = None,
    start: str | Path | None = None,
    teacher: Any = None,
    dtype: str = "auto",
    name: str = "training",
) -> PeftModel:
    """Train a LoRA on questions and answers, and continue from its last checkpoint where an earlier run left one.

    Args:
        base: The base model.
        rows: `question` and `answer` of each example.
        work: Folder that gets the checkpoints, in `name`, and the plot of what was logged.
        start: Folder of an adapter to start from; a new LoRA (`settings.target_modules`, `settings.rank`) if None.
        teacher: A model of the same vocabulary whose logits are learned instead of the answers' tokens.

    Returns:
        The base with the trained LoRA.

    Raises:
        ValueError: The checkpoints belong to other data or settings.
    """
    template = template or QuestionAnswerFormat()
    checkpoints = Path(work) / name
    checkpoints.mkdir(parents=True, exist_ok=True)
    key, stamp = work_key(settings, list(rows), str(base), start=str(start), dtype=dtype), checkpoints / "key.txt"
    if stamp.is_file() and stamp.read_text() != key:
        raise ValueError(
            f"The checkpoints in {str(checkpoints)!r} belong to other data or settings. Name another work folder, or "
            "remove them."
        )
    write_text(stamp, key)
    reference = base if isinstance(base, ModelReference) else parse_reference(base, "base")
    model = load_base(reference, dtype)
    if start is None:
        tuned: Any = new_lora(model, settings)
    else:
        tuned = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    resumed = last_checkpoint(checkpoints)
    saved: dict[str, Any] = {"save_strategy": "epoch", "save_total_limit": 1}
    if teacher is None:
        rates = settings.epochs, settings.learning_rate
        arguments = training_arguments(checkpoints, settings, *rates, resume_from_checkpoint=resumed, **saved)
        trainer: Any = train_on_answers(tuned, tokenizer, rows, arguments, template=template)
        drawn(trainer.state.log_history, work)
        return tuned.eval()
    config = DistillationConfig(
        str(checkpoints), num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
        lr_scheduler_type="linear", weight_decay=0.0, max_length=None, gradient_checkpointing=False,
        **shared_arguments(settings), **saved,
    )  # fmt: skip
    trainer = DistillationTrainer(
        tuned, teacher, config, _labelled(tokenizer, rows, template), processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=resumed)
    drawn(trainer.state.log_history, work)
    return tuned.eval()


def _labelled(tokenizer: Any, rows: Sequence[Mapping[str, str]], template: QuestionAnswerFormat) -> Dataset:
    """Token ids of prompt and answer, with the answer's tokens as labels."""
    encoded = [template.encode(tokenizer, row["question"], row["answer"]) for row in rows]
    return Dataset.from_dict(
        {"input_ids": [one.input_ids for one in encoded], "labels": [one.labels for one in encoded]}
    )


def _inputs(
    folder: Path,
    known: Discriminator,
    source: PeftModel,
    source_tokenizer: Any,
    source_reference: ModelReference,
    target_reference: ModelReference,
    target_tokenizer: Any,
    settings: TransLoraSettings,
    stages: Path,
    template: QuestionAnswerFormat | None,
    dtype: str,
) -> tuple[list[str], int, bool]:
    """The synthetic inputs, the attempts they took, and whether a discriminator filtered them."""
    judge, judge_tokenizer = _judge(folder, source, source_tokenizer, source_reference, dtype)
    if judge is None:
        logger.warning(f"{str(folder)!r} has no discriminator: every synthetic input is accepted.")
    own = settings.writer == "source"
    writer = BaseOf(source) if own else load_base(target_reference, dtype).eval()
    with active_adapter(judge, None if judge is None else DISCRIMINATOR_FOLDER):
        inputs, attempts = write_inputs(
            writer, source_tokenizer if own else target_tokenizer, known, settings, stages,
            judge=judge, judge_tokenizer=judge_tokenizer, template=template,
        )  # fmt: skip
    return inputs, attempts, judge is not None


def _judge(
    folder: Path, source: PeftModel, tokenizer: Any, source_reference: ModelReference, dtype: str
) -> tuple[Any, Any]:
    """The model that carries the discriminator: the source itself, or the older base that it was trained on."""
    discriminator = folder / DISCRIMINATOR_FOLDER
    if not (discriminator / "adapter_config.json").is_file():
        return None, None
    own = _base_reference(discriminator)
    # Where the source base was given under another name, the adapter's own config shows that the two are the same.
    if own in (source_reference, _base_reference(folder)):
        return with_adapters(source, [discriminator])[0], tokenizer
    return with_adapters(load_base(own, dtype), [discriminator])[0], _tokenizer(own)


def _base_reference(folder: Path) -> ModelReference:
    return ModelReference(*base_of_adapter(folder / "adapter_config.json"))


def load_base(reference: ModelReference, dtype: str) -> Any:
    """A base model, on the accelerator where there is one."""
    model: Any = load_model(reference.path, revision=reference.revision, dtype=dtype)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or getattr(model, "is_quantized", False):  # a quantized model is placed when it is loaded
        return model
    return model.to(device)


def _tokenizer(reference: ModelReference) -> Any:
    return load_tokenizer(reference.path, revision=reference.revision)


class BaseOf:
    """A PEFT model that generates as its base does, whichever adapter is active."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, **inputs: Any) -> Any:
        with active_adapter(self.model, BASE):
            return self.model.generate(**inputs)


def save_adapter(tuned: PeftModel, folder: Path, base: ModelReference) -> None:
    """Save a trained LoRA, with the name of its base."""
    for config in tuned.peft_config.values():
        config.base_model_name_or_path, config.revision = base.path, base.revision
    tuned.save_pretrained(str(folder))


def _retrained(
    base: Any,
    tokenizer: Any,
    inputs: Sequence[str],
    known: Discriminator,
    settings: TransLoraSettings,
    stages: Path,
    out: Path,
    template: QuestionAnswerFormat | None,
) -> float | None:
    """Train the target's discriminator on the accepted inputs (once), and put it with its seeds into `out`."""
    stage = stages / f"discriminator-{work_key(settings, list(inputs), known)}"
    if not (stage / SEEDS_FILE).is_file():
        train_discriminator(base, tokenizer, inputs, stage, settings, seeds=known.seeds, template=template)
    copy_seeds(stage, out)
    found = read_discriminator(stage)
    return found.separation if found is not None else None
