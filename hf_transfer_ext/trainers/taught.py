"""A model that first learns something: a domain, facts, people. Through a LoRA that is merged, or with all weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.files import written_aside
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.trainers.answers import train_on_answers
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig, without_teacher


def lora_config(rank: int) -> LoraConfig:
    """A LoRA on all linear layers; alpha is twice the rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def lora_on(model: Any, rank: int) -> Any:
    """`model` with a new LoRA of `lora_config`."""
    return get_peft_model(model, lora_config(rank))


def teaching_arguments(
    folder: str | Path, *, epochs: float, learning_rate: float, seed: int, **more: Any
) -> TrainingArguments:
    """A plain fine-tuning that saves nothing but its result.

    Args:
        folder: Scratch of the trainer.
        epochs: Passes over the data.
        learning_rate: Peak rate.
        more: Further fields of `TrainingArguments`.
    """
    plain: dict[str, Any] = {"per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none"}
    rest = {**plain, "num_train_epochs": epochs, "learning_rate": learning_rate, "seed": seed, **more}
    return TrainingArguments(str(folder), **rest)


def taught(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    args: TrainingArguments,
    *,
    lora_rank: int | None = 16,
    template: QuestionAnswerFormat | None = None,
    folder: str | Path | None = None,
    **changes: Any,
) -> PreTrainedModel | Any:
    """Fine-tune a model by cross entropy and return it without adapter. The given model is changed in place.

    Args:
        data: Rows of questions with answers, or of texts. A data set for `SFTTrainer` where `args` is a
            `DistillationConfig`, whose teacher and checkpoints are left out.
        lora_rank: Rank of the LoRA that is trained and merged; None trains all weights.
        template: How a question becomes a prompt.
        folder: Where the result is written, atomically. If an earlier run left it there, it is loaded instead of
            trained.
        changes: Fields of `args` that are changed for this training (`max_steps`, `learning_rate`).

    Raises:
        ValueError: Under FSDP or ZeRO-3, where a LoRA cannot be merged in place. Teach in a run of its own first.
    """
    if folder is not None and (Path(folder) / "config.json").exists():
        return load_model(folder, dtype=model.dtype)
    args = without_teacher(args) if isinstance(args, DistillationConfig) else copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    if folder is not None:
        args.output_dir = f"{folder}.checkpoints"
    is_new = not Path(str(args.output_dir)).exists()
    if isinstance(args, DistillationConfig):
        lora = None if lora_rank is None else lora_config(lora_rank)
        trainer: Any = DistillationTrainer(model, None, args, data, processing_class=tokenizer, peft_config=lora)
        if lora_rank is not None and is_sharded(accelerator=trainer.accelerator):
            raise ValueError(
                "A model cannot be taught under FSDP or ZeRO-3, which shard the weights that the LoRA is merged into. "
                "Fine-tune it in a run of its own and give the result as the teacher, with `teach_steps: 0`."
            )
        trainer.train()
    else:
        learning = model if lora_rank is None else lora_on(model, lora_rank)
        trainer = train_on_answers(learning, tokenizer, data, args, template=template)
    result = trainer.accelerator.unwrap_model(trainer.model)
    if lora_rank is not None:
        result = result.merge_and_unload()
    if trainer.is_world_process_zero():
        if folder is not None:
            with written_aside(folder, overwrite=True) as aside:
                result.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
        if is_new:
            shutil.rmtree(str(args.output_dir), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return result
