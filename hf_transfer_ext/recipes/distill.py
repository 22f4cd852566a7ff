"""Distill a model: `accelerate launch recipes/distill.py --config recipes/configs/distill/demo.yaml`.

Makes a smaller student of a teacher, distills, compares it with the teacher and a twin trained without, and saves it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from hf_transfer_ext.data.facts import FACTS_DATASET, fact_questions
from hf_transfer_ext.evals.language import measure_gain, measure_language_model
from hf_transfer_ext.files import require_free_space
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.recipe import parse_recipe, setting
from hf_transfer_ext.recipes.distill_data import data_of, rows_of_student
from hf_transfer_ext.recipes.distill_task import distilled_task
from hf_transfer_ext.recipes.run import TRAINER_GROUPS, run_recipe
from hf_transfer_ext.recipes.student import StudentArguments, load_student, make_student, refuse_unused
from hf_transfer_ext.recipes.teacher import describe, prepared_teacher, settle_teacher, teacher_paths
from hf_transfer_ext.recipes.training import output_of, start_training
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
from hf_transfer_ext.trainers.saving import load_whole, refuse_zero3, save_whole
from hf_transfer_ext.trainers.tasks import CAUSAL_LM
from hf_transfer_ext.trainers.taught import taught


@dataclass
class DistillArguments(StudentArguments):
    """Which teacher, which student, and on which data. The training itself is set by `DistillationConfig`."""

    teacher: str | None = setting(None, "teacher", "Folder, Hub id, or demo (Gemma 3 270M).")
    teach_steps: int = setting(0, "teacher", "> 0: fine-tune the teacher on the training data first (LoRA).")
    teach_learning_rate: float = setting(1e-3, "teacher", "Peak learning rate of that.")
    trim_vocabulary: bool = setting(False, "student", "Keep only the tokens of the training data.")
    dataset: str = setting("facts", "data", "File, folder, Hub id, or facts (made from packages).")
    dataset_config: str | None = setting(None, "data", "Configuration of a Hub data set.")
    dataset_revision: str | None = setting(None, "data", "Hub revision.")
    columns: dict[str, str] | None = setting(None, "data", "Role -> your column: {text: body}.")
    train_split: str = setting("train", "data", "Split to train on.")
    test_split: str | None = setting("test", "data", "Held-out split; none: nothing is measured.")
    train_rows: int | None = setting(None, "data", "Rows that the student learns from; the teacher learns from all.")
    streaming: bool = setting(False, "data", "Read rows as they are needed.")
    test_rows: int = setting(64, "evaluation", "Held-out rows (and questions, of facts) to measure on.")
    compare_with_ce: bool = setting(False, "evaluation", "Train a twin on cross entropy alone, too.")
    overwrite: bool = setting(False, "training", "Replace a result that is there.")
    dry_run: bool = setting(False, "training", "Load and check everything, print the plan with the teachers' memory.")


def main(argv: list[str] | None = None) -> dict[str, list[Any]]:
    job, args = parse_recipe(DistillArguments, DistillationConfig, argv=argv, groups=TRAINER_GROUPS)
    settle_teacher(job, args)
    refuse_unused(job, args, twin=job.compare_with_ce)
    with output_of(job, args):
        if args.task != CAUSAL_LM:
            return distilled_task(job, args, argv, __file__)
        return distilled(job, args, argv)


def distilled(job: DistillArguments, args: DistillationConfig, argv: list[str] | None) -> dict[str, list[Any]]:
    """Make the student, train, measure and save it; with `dry_run`, only print the plan."""
    if job.student is None or job.trim_vocabulary or job.compare_with_ce:
        refuse_zero3("Name a finished `student`; leave `trim_vocabulary` and `compare_with_ce` off.")
    read = (job.student, job.dataset, *teacher_paths(job, args))
    run = start_training("distillation", __file__, argv, job, args, overwrite=job.overwrite, inputs=read)
    record = run.record
    data, test = data_of(job, args)
    of_student = rows_of_student(job, args, data)
    questions = fact_questions(str(job.test_split)) if test and job.dataset == FACTS_DATASET else []
    teacher, tokenizer = prepared_teacher(job, args, run, data)
    with record.stage("make the student"):
        teacher_tokenizer = tokenizer
        if job.student is None:
            student = make_student(job, teacher, tokenizer, of_student, args, run.work / "learngene")
        else:
            student, tokenizer = load_student(job, args, record)
        twin = copy.deepcopy(student) if job.compare_with_ce else None
        require_free_space(run.out, 5 * 4 * student.num_parameters())  # a checkpoint with its optimizer, the result
    tokenizers = {"processing_class": tokenizer, "teacher_processing_class": teacher_tokenizer}
    trainer = DistillationTrainer(student, teacher, args, of_student, **tokenizers, peft_config=job.adapter())
    if job.dry_run:
        print(trainer.plan())
        return {}
    describe(trainer, args, record)
    whole = not is_sharded(accelerator=trainer.accelerator)
    reference = teacher if whole and not args.is_span_loss else None  # one of other tokens is not measured
    looks: Any = {"limit": job.test_rows, "dataset": job.dataset, "accelerator": trainer.accelerator}
    measured: dict[str, list[Any]] = {}

    def measure(name: str, model: Any, against: Any) -> None:
        if test:
            with record.stage(f"measure {name}"):
                looked = model.to(trainer.accelerator.device), tokenizer, test
                measured[name] = measure_language_model(*looked, questions=questions, reference=against, **looks)

    if reference is not None:
        measure("teacher", teacher, None)
    if whole:  # what is sharded is not measured
        measure("student before", student, reference)
    with record.stage("distill"):
        trainer.train(resume_from_checkpoint=run.checkpoint)
        student = load_whole(save_whole(trainer, run.work / "student"))  # what is saved is what is measured
    measure("student", student, reference)
    if twin is not None:
        with record.stage("train the twin"):
            twin = taught(twin, tokenizer, of_student, args, lora_rank=job.student_lora_rank or None)
        measure("twin without teacher", twin, reference)
        if test:
            measured["student"] += measure_gain(student, twin, "twin without teacher", tokenizer, test, **looks)
    if trainer.is_world_process_zero():
        run.finish(measured, "student", student, tokenizer, trainer)
    return measured


if __name__ == "__main__":
    run_recipe("distill", main)
