"""The distillation recipe for the tasks of `trainers/tasks/`: `task: sequence_classification` in its configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_transfer_ext.files import written_aside
from hf_transfer_ext.hub.record import describe_dataset
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.recipes.distill_data import data_of_task
from hf_transfer_ext.recipes.run import load_named, model_path
from hf_transfer_ext.recipes.student import load_student, make_student
from hf_transfer_ext.recipes.training import start_training
from hf_transfer_ext.trainers.distillation_config import DistillationConfig, forget_loading, without_teacher
from hf_transfer_ext.trainers.distillation_models import teacher_loading
from hf_transfer_ext.trainers.saving import load_whole, save_whole
from hf_transfer_ext.trainers.task_distillation import TaskDistillationTrainer
from hf_transfer_ext.trainers.tasks import TASKS


def check_job(job: Any, args: DistillationConfig) -> None:
    """Refuse settings of the recipe that are about language models.

    Raises:
        ValueError: A setting would have no effect, or no model is named as the teacher.
    """
    for name in ("trim_vocabulary", "learngene_steps", "student_four_bit"):
        if getattr(job, name):
            raise ValueError(f"`{name}` is for language models, but `task` is {args.task!r}. Leave it out.")
    if job.teacher is None:
        raise ValueError(f"The task {args.task} learns from a model. Name the `teacher`.")


def distilled_task(job: Any, args: DistillationConfig, argv: list[str] | None, script: str) -> dict[str, list[Any]]:
    """Load teacher and student, train, measure and save the student; with `dry_run`, only print the plan."""
    check_job(job, args)
    task, place = TASKS[args.task], Path(job.dataset)
    if "image_folder" in task.options and place.exists():  # what paths in the data are relative to
        folder = place.parent if place.is_file() else place
        args.task_options = {"image_folder": str(folder), **dict(args.task_options)}  # type: ignore[arg-type]
    read = (job.student, job.dataset, job.teacher)
    run = start_training("distillation", script, argv, job, args, overwrite=job.overwrite, inputs=read)
    record = run.record
    data, of_student, test = data_of_task(job, args)
    record.inputs.append(describe_dataset(job.dataset, job.dataset_revision))
    with record.stage("load the teacher"):
        how = teacher_loading(args)
        labels = {"data": data} if job.teach_steps > 0 else {}
        loading = {**task.loading(model_path(job.teacher), how["revision"], **labels), **how}
        teacher, tokenizer = load_named(job.teacher, record, "teacher", load_reader=task.load_reader, **loading)
        forget_loading(args)  # obeyed here; the trainer gets a loaded model
    if job.teach_steps > 0:
        with record.stage("teach the teacher"):
            steps = {"max_steps": job.teach_steps, "learning_rate": job.teach_learning_rate}
            teacher = fine_tuned(teacher, tokenizer, data, args, run.work / "teacher", **steps)
    with record.stage("make the student"):
        set_seed(args.seed)  # of a new output layer, whether the teacher was taught above or in an earlier run
        if job.student is None:
            student, own = make_student(job, teacher, tokenizer, of_student, args, run.work), tokenizer
        else:
            loading = task.loading(job.student, job.student_revision, like=teacher.config)
            student, own = load_student(job, args, record, load_reader=task.load_reader, **loading)
        twin = copy.deepcopy(student) if job.compare_with_ce else None
    adapter = job.adapter()
    if adapter is not None:
        adapter.task_type = task.kind().peft_task
    trainer = TaskDistillationTrainer(student, teacher, args, of_student, own, tokenizer, peft_config=adapter)
    trainer.describe(record)
    if job.dry_run:
        print(f"Task: {args.task}\n{trainer.plan()}")
        return {}
    whole = test is not None and not is_sharded(accelerator=trainer.accelerator)  # what is sharded is not measured
    measured: dict[str, list[Any]] = {}

    def measure(name: str, model: Any) -> None:
        if whole:
            with record.stage(f"measure {name}"):
                measured[name] = trainer.measure(test, model=model, dataset=job.dataset)

    measure("teacher", teacher)
    measure("student before", trainer.model)
    with record.stage("distill"):
        trainer.train(resume_from_checkpoint=run.checkpoint)
        student = load_whole(save_whole(trainer, run.work / "student"), **task.loading(run.work / "student"))
    measure("student", student)
    if twin is not None:
        with record.stage("train the twin"):
            twin = fine_tuned(twin, own, of_student, args, run.work / "twin")
        measure("twin without teacher", twin)
    if trainer.is_world_process_zero():
        run.finish(measured, "student", student, own, trainer)
    return measured


def fine_tuned(model: Any, tokenizer: Any, data: Any, args: Any, folder: Path, **changes: Any) -> Any:
    """The model trained on the labels of the data alone; loaded from `folder` if an earlier run left it there."""
    if (folder / "config.json").exists():
        return load_model(folder, dtype=model.dtype, **TASKS[args.task].loading(folder))
    plain = without_teacher(args)
    plain.output_dir = f"{folder}.checkpoints"
    for name, value in changes.items():
        setattr(plain, name, value)
    trainer = TaskDistillationTrainer(model, None, plain, data, tokenizer)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        with written_aside(folder, overwrite=True) as aside:
            trained.save_pretrained(aside)
    trainer.accelerator.wait_for_everyone()
    return trained.eval()
