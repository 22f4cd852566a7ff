"""Distil a language model: `accelerate launch recipes/distill.py --config recipes/configs/distill/demo.yaml`.

Loads a teacher (and teaches it the domain first, where asked), makes a smaller student of it, distils, compares them
with each other and with a twin trained without the teacher, and saves the student with its card and record.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_transfer_ext.data.facts import FACTS_DATASET, fact_questions
from hf_transfer_ext.data.text import load_text_dataset
from hf_transfer_ext.evals.language import as_example, measure_language_model
from hf_transfer_ext.files import refuse_existing_output, require_free_space
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.record import RunRecord, describe_dataset, describe_input
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import parse_recipe, settings_of
from hf_transfer_ext.students import STUDENT_INITS
from hf_transfer_ext.students.vocabulary import trim_vocabulary
from hf_transfer_ext.teachers.demo import demo_model
from hf_transfer_ext.teachers.live import shards_parameters
from hf_transfer_ext.trainers.distillation import DistillationConfig, DistillationTrainer, without_teacher
from hf_transfer_ext.trainers.saving import last_checkpoint, load_whole, save_whole, training_folder
from hf_transfer_ext.trainers.taught import taught


@dataclass
class DistillArguments:
    """Who teaches whom on what. The training itself is set by `DistillationConfig`."""

    teacher: str = field(default="demo", metadata={"help": "Folder, Hub id, or demo (Gemma 3 270M)."})
    student: str | None = field(default=None, metadata={"help": "Folder or Hub id; None: made from the teacher."})
    student_revision: str | None = None
    student_init: str = field(default="uniform_depth", metadata={"help": f"One of {', '.join(STUDENT_INITS)}."})
    student_layers: int | None = field(default=None, metadata={"help": "Depth of a student made from the teacher."})
    trim_vocabulary: bool = field(default=False, metadata={"help": "Keep only the tokens of the training data."})
    teach_steps: int = field(default=0, metadata={"help": "> 0: teach the teacher the training data first (LoRA)."})
    teach_learning_rate: float = 1e-3
    dataset: str = field(default="facts", metadata={"help": "File, folder, Hub id, or facts (made from packages)."})
    dataset_config: str | None = None
    dataset_revision: str | None = None
    columns: dict[str, str] | str | None = field(default=None, metadata={"help": "Role -> your column, as JSON."})
    train_split: str = "train"
    test_split: str | None = field(default="test", metadata={"help": "Held-out split; None: nothing is measured."})
    test_rows: int = field(default=64, metadata={"help": "Held-out rows (and questions, of facts) to measure on."})
    streaming: bool = False
    compare_with_ce: bool = field(default=False, metadata={"help": "Train a twin on cross-entropy alone, too."})
    overwrite: bool = False


def main(argv: list[str] | None = None) -> dict[str, list[Any]]:
    told, args = parse_recipe(DistillArguments, DistillationConfig, argv=argv)
    out = refuse_existing_output(args.output_dir, overwrite=told.overwrite)
    record = RunRecord("distillation", "recipes/distill.py", settings_of(told, args), seed=args.seed)
    if is_deepspeed_zero3_enabled() and (told.student is None or told.trim_vocabulary or told.compare_with_ce):
        raise ValueError(
            "ZeRO-3 shards models while they are loaded, so none can be cut, trimmed or copied. Make the student in a "
            "run of its own and name it with `student`; leave `trim_vocabulary` and `compare_with_ce` off."
        )
    work = training_folder(out, resume=bool(args.resume_from_checkpoint), overwrite=told.overwrite)
    publish, args.push_to_hub, args.output_dir = args.push_to_hub, False, str(work / "checkpoints")
    set_seed(args.seed)
    load = partial(
        load_text_dataset, told.dataset, columns=told.columns, streaming=told.streaming,
        config_name=told.dataset_config, revision=told.dataset_revision,
    )  # fmt: skip
    data, test = load(split=told.train_split), told.test_split and load(split=told.test_split)
    questions = fact_questions(told.test_split) if test and told.dataset == FACTS_DATASET else []

    with record.stage("load the teacher"):
        path = demo_model() if told.teacher == "demo" else told.teacher
        teacher = load_model(path, revision=args.teacher_revision, dtype=args.teacher_dtype)
        tokenizer = load_tokenizer(path, revision=args.teacher_revision)
        record.inputs.append(describe_input(path, args.teacher_revision, "teacher", model=teacher))
        record.inputs.append(describe_dataset(told.dataset, told.dataset_revision))
    files = {}
    if told.trim_vocabulary:
        with record.stage("trim the vocabulary"):
            texts = (text for row in data for text in as_example(row, tokenizer).values())
            teacher, tokenizer, vocabulary = trim_vocabulary(teacher, tokenizer, texts)
            files["vocabulary_map.json"] = vocabulary.save(work)
    if told.teach_steps > 0:
        with record.stage("teach the teacher"):
            rate = told.teach_learning_rate
            teacher = taught(teacher, tokenizer, data, args, work / "teacher", told.teach_steps, rate)
    with record.stage("make the student"):
        teacher_tokenizer = tokenizer
        if told.student is None:
            depth = told.student_layers or teacher.config.get_text_config().num_hidden_layers // 2
            student = STUDENT_INITS[told.student_init](teacher, num_layers=depth).float()
        else:
            student = load_model(told.student, revision=told.student_revision, dtype="float32")
            tokenizer = load_tokenizer(told.student, revision=told.student_revision)
            record.inputs.append(describe_input(told.student, told.student_revision, "student", model=student))
        twin = copy.deepcopy(student) if told.compare_with_ce else None
        require_free_space(out, 5 * 4 * student.num_parameters())  # a checkpoint with its optimizer, and the result
    trainer = DistillationTrainer(student, teacher, args, data, tokenizer, teacher_processing_class=teacher_tokenizer)
    reference = None if shards_parameters(trainer.accelerator) else teacher  # a sharded one is not measured
    measured: dict[str, list[Any]] = {}

    def measure(name: str, model: Any, against: Any) -> None:
        if test:
            with record.stage(f"measure {name}"):
                measured[name] = measure_language_model(
                    model.to(trainer.accelerator.device), tokenizer, test, questions=questions, reference=against,
                    limit=told.test_rows, accelerator=trainer.accelerator, dataset=told.dataset,
                )  # fmt: skip

    if reference is not None:
        measure("teacher", teacher, None)
        measure("student before", student, reference)
    with record.stage("distil"):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint and last_checkpoint(args.output_dir))
        student = load_whole(save_whole(trainer, work / "student"))  # what is saved is what is measured
    measure("student", student, reference)
    if twin is not None:
        with record.stage("train the twin"):
            plain = DistillationTrainer(twin, None, without_teacher(args), data, tokenizer)
            plain.train()
        measure("twin without teacher", plain.accelerator.unwrap_model(plain.model), reference)

    if trainer.is_world_process_zero():
        finish_run(
            out, record, measured, result="student", model=student, tokenizer=tokenizer, files=files,
            overwrite=told.overwrite, precision="bfloat16" if args.bf16 else None,
            push_to=args.hub_model_id or out.name if publish else None, private=args.hub_private_repo,
        )  # fmt: skip
    return measured


if __name__ == "__main__":
    main()
