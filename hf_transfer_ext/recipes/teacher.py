"""Teachers of the distillation recipe: one model, or several, a server, a complete cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from hf_transfer_ext.evals.language import as_example
from hf_transfer_ext.hub.record import RunRecord, describe_dataset, describe_input
from hf_transfer_ext.hub.teacher_cache import ON_HUB
from hf_transfer_ext.recipes.run import load_named, model_path
from hf_transfer_ext.recipes.training import TrainingRun
from hf_transfer_ext.students.vocabulary import trim_vocabulary
from hf_transfer_ext.trainers.distillation_config import DistillationConfig, forget_loading
from hf_transfer_ext.trainers.distillation_models import teacher_loading
from hf_transfer_ext.trainers.taught import taught


def settle_teacher(job: Any, args: DistillationConfig) -> None:
    """Put the one teacher model into `job.teacher`, whichever name it was given under; None where others teach.

    Raises:
        ValueError: No teacher is named, or two, or a setting needs the teacher model.
    """
    names = sorted(filter(None, {job.teacher, args.teacher_model_name_or_path}))
    elsewhere = [name for name in ("teacher_adapter", "teacher_server", "teachers") if getattr(args, name)]
    if len(names) + len(elsewhere) > 1 or not (names or elsewhere or args.teacher_cache):
        got = " and ".join([*names, *(f"`{name}`" for name in elsewhere)]) or "none"
        raise ValueError(
            f"Name one `teacher`: a folder, a Hub id, or demo (Gemma 3 270M); got {got}. Instead of a model, "
            "`teachers`, `teacher_server`, `teacher_adapter` or a complete `teacher_cache` can teach a `student`."
        )
    args.teacher_model_name_or_path, job.teacher = None, names[0] if names else None
    if job.teacher is None:
        found = elsewhere[0] if elsewhere else "teacher_cache"
        if job.student is None:
            raise ValueError(f"A student is made from a model, but `{found}` teaches. Name the `student`.")
        for name in ("trim_vocabulary", "teach_steps"):
            if getattr(job, name):
                raise ValueError(f"`{name}` needs a model as the `teacher`, but `{found}` teaches. Leave it out.")
    for entry in cast(Any, args.teachers or ()):
        if entry.get("model"):
            entry["model"] = str(model_path(entry["model"]))
    if args.is_span_loss and (job.student is None or job.trim_vocabulary):
        raise ValueError(
            f"`loss: {args.loss}` is for a student with another tokenizer than the teacher's. Name it by `student`, "
            "without `trim_vocabulary`, or choose a divergence."
        )
    if job.dry_run:
        job.teach_steps = job.learngene_steps = 0  # nothing is trained


def teacher_paths(job: Any, args: DistillationConfig) -> list[str]:
    """Files and folders that the teachers are read from."""
    named = [entry.get(kind) for entry in cast(Any, args.teachers or ()) for kind in ("model", "cache")]
    found = [str(path) for path in (job.teacher, args.teacher_cache, *named) if path]
    return [path for path in found if not path.startswith(ON_HUB)]


def prepared_teacher(job: Any, args: DistillationConfig, run: TrainingRun, data: Any) -> tuple[Any, Any]:
    """The teacher and its tokenizer, trimmed and taught as the settings say; None and None where others teach."""
    record = run.record
    teacher: Any = None
    tokenizer: Any = None
    with record.stage("load the teacher"):
        if job.teacher is not None:
            teacher, tokenizer = load_named(job.teacher, record, "teacher", **teacher_loading(args))
            forget_loading(args)  # obeyed here; the trainer gets a loaded model
        record.inputs.append(describe_dataset(job.dataset, job.dataset_revision))
    if job.trim_vocabulary:
        with record.stage("trim the vocabulary"):
            texts = (text for row in data for text in as_example(row, tokenizer).values())
            teacher, tokenizer, vocabulary = trim_vocabulary(teacher, tokenizer, texts)
            run.files["vocabulary_map.json"] = vocabulary.save(run.work)
    if job.teach_steps > 0:
        with record.stage("teach the teacher"):
            changes = {"max_steps": job.teach_steps, "learning_rate": job.teach_learning_rate}
            teacher = taught(teacher, tokenizer, data, args, folder=run.work / "teacher", **changes)
    return teacher, tokenizer


def describe(trainer: Any, args: Any, record: RunRecord) -> None:
    """Note in the record which models teach besides `teacher`, their memory, and what the vocabularies share."""
    for entry in args.teachers or ():
        if entry.get("model"):
            record.inputs.append(describe_input(Path(entry["model"]), entry.get("revision"), "teacher"))
    for cache in [args.teacher_cache, *(entry.get("cache") for entry in args.teachers or ())]:
        if str(cache).startswith(ON_HUB):
            record.inputs.append(describe_dataset(str(cache).removeprefix(ON_HUB)))
    trainer.describe(record)
    if trainer.span_teachers:
        record.not_measured.append("KL to the teacher: student and teacher have different tokenizers.")
