"""A teacher that first learns the domain: a teacher that has never seen a text's form is worse than its student."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_transfer_ext.files import written_aside
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.trainers.distillation import DistillationConfig, DistillationTrainer, without_teacher


def taught(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    args: DistillationConfig,
    folder: str | Path,
    steps: int,
    learning_rate: float,
    *,
    rank: int = 16,
) -> PreTrainedModel:
    """Fine-tune a teacher on the training data through a LoRA, merge it, and keep the result in `folder`.

    Where `folder` holds the result of an earlier run already, that is loaded: an interrupted recipe goes on.

    Args:
        args: The student's configuration; batch size, sequence length, schedule and precision are taken from it.
        steps: Optimizer steps.
        learning_rate: Peak rate of the LoRA.
        rank: Rank of the LoRA on all linear layers; alpha is twice the rank.

    Raises:
        ValueError: Under FSDP or ZeRO-3, where a LoRA cannot be merged in place. Teach in a run of its own first.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return load_model(folder, dtype=teacher.dtype)
    config = copy.copy(without_teacher(args))
    config.max_steps, config.learning_rate, config.output_dir = steps, learning_rate, str(folder) + ".checkpoints"
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    trainer = DistillationTrainer(teacher, None, config, dataset, tokenizer, peft_config=lora)
    if is_sharded(accelerator=trainer.accelerator):
        raise ValueError(
            "A teacher cannot be taught under FSDP or ZeRO-3, which shard the weights that the LoRA is merged into. "
            "Fine-tune it in a run of its own and give the result as the teacher, with `teach_steps: 0`."
        )
    trainer.train()
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    if trainer.is_world_process_zero():
        with written_aside(folder) as aside:
            merged.save_pretrained(aside)
        shutil.rmtree(config.output_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return merged
