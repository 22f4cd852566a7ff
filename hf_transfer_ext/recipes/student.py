"""The models of the distillation recipe: the teacher, and a student of its own or made from the teacher."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_transfer_ext.files import written_aside
from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.recipe import setting
from hf_transfer_ext.recipes.run import load_named, packed
from hf_transfer_ext.recipes.student_adapter import AdapterArguments, refuse_adapter
from hf_transfer_ext.students import AUXILIARIES, STUDENT_INITS, StudentShape
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig, between_stages
from hf_transfer_ext.trainers.distillation_models import train_adapters

#: How a student is made where nothing is said.
INIT = "uniform_depth"


@dataclass
class StudentArguments(AdapterArguments):
    """Which student: a folder or Hub id, or how it is made from the teacher."""

    student: str | None = setting(None, "student", "Folder or Hub id; none: made from the teacher.")
    student_init: str | None = setting(None, "student", f"How it is made: {', '.join(STUDENT_INITS)}; none: {INIT}.")
    student_options: dict[str, Any] = setting({}, "student", "Options of that: {stages: [3, 3, 4, 3, 3]}.")
    student_layers: int | None = setting(None, "student", "Its depth; none: half of the teacher's.")
    learngene_steps: int = setting(
        0, "student", f"> 0: first distill the model with shared layers of {' or '.join(AUXILIARIES)}, and expand it."
    )


def refuse_unused(job: StudentArguments, args: DistillationConfig, *, twin: bool = False) -> None:
    """Refuse settings of a student that is made beside one that is named, and the other way round.

    Args:
        twin: Whether a copy of the student is trained without the teacher, too.

    Raises:
        ValueError: A setting would have no effect.
    """
    init = job.student_init or INIT
    of_named: dict[str, Any] = {field.name: getattr(job, field.name) for field in fields(AdapterArguments)}
    of_named["model_init_kwargs"] = args.model_init_kwargs
    names = ("student_init", "student_options", "student_layers", "learngene_steps")
    unused = of_named if job.student is None else {name: getattr(job, name) for name in names}
    for name, value in unused.items():
        if value:
            state = "made from the teacher" if job.student is None else "named by `student`"
            raise ValueError(f"`{name}` is {value!r}, but the student is {state}, so it has no effect. Leave it out.")
    refuse_adapter(job, twin=twin)
    STUDENT_INITS[init]
    if job.learngene_steps > 0 and init not in AUXILIARIES:
        raise ValueError(
            f"`learngene_steps` is {job.learngene_steps}, but {init} has no model with shared layers to distill. "
            f"Choose `student_init` {' or '.join(AUXILIARIES)}, or leave it at 0."
        )


def make_student(
    job: StudentArguments, teacher: Any, tokenizer: Any, data: Any, args: DistillationConfig, folder: Path
) -> Any:
    """A student in float32 from the teacher; with `learngene_steps`, from an auxiliary model that is distilled first.

    Args:
        folder: Where the student of a distilled auxiliary model is written, atomically. If an earlier run left it
            there, it is loaded.

    Raises:
        ValueError: Options that the initialization does not take, or an auxiliary model under FSDP.
    """
    init = job.student_init or INIT
    shape = StudentShape(depth=job.student_layers or teacher.config.get_text_config().num_hidden_layers // 2)
    if job.learngene_steps <= 0:
        return STUDENT_INITS[init](teacher, shape, **job.student_options).float()
    if (folder / "config.json").exists():
        return load_model(folder, dtype="float32")
    auxiliary = AUXILIARIES[init](teacher, **job.student_options).float()
    plain = between_stages(args)
    plain.max_steps, plain.output_dir = job.learngene_steps, f"{folder}.checkpoints"
    trainer = DistillationTrainer(
        auxiliary, teacher, plain, data, processing_class=tokenizer, teacher_processing_class=tokenizer
    )
    if is_sharded(accelerator=trainer.accelerator):
        raise ValueError("`learngene_steps` share layers, which FSDP cannot shard. Run that stage with plain DDP.")
    trainer.train()
    options = {name: value for name, value in job.student_options.items() if name != "representative"}
    student = STUDENT_INITS[init](trainer.accelerator.unwrap_model(trainer.model), shape, **options).float()
    if trainer.is_world_process_zero():
        with written_aside(folder, overwrite=True) as aside:
            student.save_pretrained(aside)
    trainer.accelerator.wait_for_everyone()
    return student.to(teacher.device)


def load_student(
    job: StudentArguments, args: DistillationConfig, record: RunRecord, **loading: Any
) -> tuple[Any, Any]:
    """The student that `student` names and its tokenizer, in float32 unless `model_init_kwargs` say otherwise.

    Args:
        loading: Further arguments of `load_model`.
    """
    stated: Any = args.model_init_kwargs or {}
    how: dict[str, Any] = {"dtype": "float32", "revision": job.student_revision}
    how["trust_remote_code"] = args.trust_remote_code
    how |= packed(job.student_four_bit, args)
    args.model_init_kwargs = None  # obeyed here; the trainer gets a loaded model
    model, tokenizer = load_named(str(job.student), record, "student", **{**loading, **how, **stated})
    train_adapters(model)
    return model, tokenizer
