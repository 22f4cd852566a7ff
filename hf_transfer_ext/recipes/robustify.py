"""Make an unlearned model hold against relearning: `accelerate launch recipes/robustify.py --config FILE.yaml`.

The second half of UNDO (unlearn, noise, distill on outputs): a copy of the unlearned model with smaller weights and
noise is distilled from the unlearned model, on data that covers what has to stay. What the model only hides does not
come along. `recipes/configs/unlearn/robustify.yaml` is a configuration for two CPU cores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset

from hf_transfer_ext.data.forget_retain import encode_row, learned_rows
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.text import load_train_and_test
from hf_transfer_ext.edits.methods.shrink_and_perturb import perturb_model
from hf_transfer_ext.evals.forget_retain import forget_retain
from hf_transfer_ext.evals.language import as_example
from hf_transfer_ext.hub.record import describe_dataset
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.recipe import parse_recipe, setting
from hf_transfer_ext.recipes.forget_retain import ForgetRetainArguments
from hf_transfer_ext.recipes.run import TRAINER_GROUPS, load_named, run_recipe
from hf_transfer_ext.recipes.training import start_training
from hf_transfer_ext.settings import REQUIRED
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
from hf_transfer_ext.trainers.saving import load_whole, refuse_zero3, save_whole
from hf_transfer_ext.trainers.tasks import CAUSAL_LM


@dataclass
class RobustifyArguments(ForgetRetainArguments):
    """The unlearned model, the noise, and the data. The distillation itself is set by `DistillationConfig`."""

    model_name_or_path: str = setting(REQUIRED, "model", "Folder or Hub id of the unlearned model, or its adapter.")
    revision: str | None = setting(None, "model", "Hub revision.")
    dtype: str = setting("float32", "model", "auto, float32 or bfloat16.")
    share: float = setting(0.6, "noise", "How much of the weights goes, from 0 to 1 (a new model).")
    noise_scale: float = setting(0.1, "noise", "Scale of the noise that comes instead.")
    split: str = setting("train", "data", "Split of both.")
    texts: str | None = setting(
        None, "data", "Further texts that cover what has to stay: file, folder, Hub id, or facts."
    )
    text_rows: int | None = setting(None, "data", "Use so many of them; none: all.")
    distill_forget: bool = setting(True, "data", "Also distill what the unlearned model says about the forget set.")
    overwrite: bool = setting(False, "training", "Replace a result that is there.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    job, args = parse_recipe(RobustifyArguments, DistillationConfig, argv=argv, groups=TRAINER_GROUPS)
    if not 0 < job.share <= 1 or job.noise_scale < 0:
        raise ValueError(
            f"`share` has to be in (0, 1] and `noise_scale` at least 0, got {job.share} and {job.noise_scale}."
        )
    if job.distill_forget and args.ce_weight > 0:
        raise ValueError(
            f"`ce_weight` is {args.ce_weight}: cross entropy would teach the answers of the forget set again. Set it "
            "to 0, or `distill_forget` to false."
        )
    if args.kd_weight == 0 or args.task != CAUSAL_LM:
        raise ValueError(
            f"The unlearned model teaches its own copy: set `kd_weight` above 0 and `task` to {CAUSAL_LM}."
        )
    refuse_zero3("A copy of the model is perturbed here, which needs it whole.")
    read = (job.model_name_or_path, job.forget_data, job.retain_data, job.texts)
    run = start_training("unlearning", __file__, argv, job, args, overwrite=job.overwrite, inputs=read)
    record = run.record
    splits = job.rows(record, args.seed, split=job.split)
    record.inputs += [describe_dataset(name) for name in (job.texts,) if name]
    with record.stage("load"):
        named: Any = {"revision": job.revision, "dtype": job.dtype}
        teacher, tokenizer = load_named(job.model_name_or_path, record, **named)
        if hasattr(teacher, "merge_and_unload"):
            teacher = teacher.merge_and_unload()
    template = QuestionAnswerFormat(template=job.template)
    parts = ("retain", "forget") if job.distill_forget else ("retain",)
    rows = [row for part in parts for row in learned_rows(splits, part)]
    if job.texts is not None:
        rows += [as_example(row, tokenizer) for row in islice(load_train_and_test(job.texts)[0], job.text_rows)]
    student = copy.deepcopy(teacher).requires_grad_(True)
    perturb_model(student, share=job.share, noise_scale=job.noise_scale, seed=args.seed)
    data = Dataset.from_list(as_training_rows(rows, tokenizer, template))
    trainer = DistillationTrainer(student, teacher, args, data, processing_class=tokenizer)
    looks: Any = {"template": template, "accelerator": trainer.accelerator, "batch_size": 32}
    measured: dict[str, Any] = {}

    def measure(name: str, model: Any) -> None:
        with record.stage(f"measure {name}"):
            measured[name] = forget_retain(model.to(trainer.accelerator.device), tokenizer, splits, **looks)

    measure("unlearned", teacher)
    if not is_sharded(accelerator=trainer.accelerator):  # what is sharded is not measured
        measure("with noise", student)
    with record.stage("distill"):
        trainer.train(resume_from_checkpoint=run.checkpoint)
        student = load_whole(save_whole(trainer, run.work / "student"))  # what is saved is what is measured
    measure("distilled", student)
    if trainer.is_world_process_zero():
        run.finish(measured, "distilled", student, tokenizer, trainer)
    return measured


def as_training_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, template: Any) -> list[dict[str, list[int]]]:
    """Rows in any form of `encode_row` as those of the trainer; only the tokens after a prompt are distilled."""
    answers = [answer for row in rows for answer, _ in encode_row(tokenizer, row, template, {})]
    return [{"input_ids": one.input_ids, "labels": one.labels} for one in answers]


if __name__ == "__main__":
    run_recipe("robustify", main)
