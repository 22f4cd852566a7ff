"""Teaching a model the data that an unlearning run then forgets, and one that never sees what is forgotten."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from accelerate import PartialState

from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.recipes.training import TrainingRun
from hf_transfer_ext.trainers.taught import taught, teaching_arguments


def teach(run: TrainingRun, job: Any, model: Any, tokenizer: Any, rows: Any, template: Any) -> Any:
    """Fine-tune on both sets, and a second model on the retain set alone if it is asked for; save them as results."""
    settings = teaching_settings(run, job.teach_epochs, job.teach_learning_rate)
    options: Any = {"lora_rank": job.lora_rank, "template": template}
    if job.retrained_dir is not None:
        without = taught(copy.deepcopy(model), tokenizer, rows["retain"], settings, **options)
        save_taught(run, job.retrained_dir, without, tokenizer)
    model = taught(model, tokenizer, rows["forget"] + rows["retain"], settings, **options)
    save_taught(run, job.original_dir, model, tokenizer)
    return model


def teaching_settings(run: TrainingRun, epochs: float, learning_rate: float) -> Any:
    """A plain fine-tuning with a cosine schedule and a short warm-up."""
    how: Any = {"epochs": epochs, "learning_rate": learning_rate, "seed": run.args.seed}
    return teaching_arguments(
        run.work / "teaching", lr_scheduler_type="cosine", warmup_steps=5, logging_steps=20, **how
    )


def save_taught(run: TrainingRun, folder: str | None, model: Any, tokenizer: Any) -> None:
    """Save a model as a result of its own, on the main process; nothing without a folder."""
    if folder is not None and PartialState().is_main_process:
        record = replace(run.record, job="fine-tuning", inputs=list(run.record.inputs), stages=[])
        finish_run(folder, record, model=model, tokenizer=tokenizer, overwrite=run.replaces, quiet=True)
