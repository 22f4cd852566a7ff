"""Make a language model forget: `accelerate launch recipes/unlearn.py --config recipes/configs/unlearn/demo.yaml`.

Trains a LoRA that forgets one set of questions and answers and keeps another, measures both before and after, and
saves the result with its card and record. Without data of your own it teaches the model fictitious people first.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments, set_seed

from hf_transfer_ext.data.forget_retain import forget_retain_rows
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.suites.forget_retain import forget_retain
from hf_transfer_ext.files import refuse_existing_output, written_aside
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.record import RunRecord, describe_input
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import parse_recipe, settings_of
from hf_transfer_ext.students.vocabulary import trim_vocabulary
from hf_transfer_ext.teachers.demo import demo_model
from hf_transfer_ext.trainers.answers import train_on_answers
from hf_transfer_ext.trainers.saving import last_checkpoint, training_folder
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer


@dataclass
class UnlearnArguments:
    """What is forgotten by whom. The training itself is set by `UnlearningConfig`."""

    model_name_or_path: str = field(default="demo", metadata={"help": "Folder, Hub id, or demo (Gemma 3 270M)."})
    dtype: str = field(default="float32", metadata={"help": "auto, float32 or bfloat16."})
    forget_data: str | None = field(default=None, metadata={"help": "File, folder or Hub id; None: made-up people."})
    retain_data: str | None = field(default=None, metadata={"help": "File, folder or Hub id."})
    split: str = "train"
    columns: str = field(default="{}", metadata={"help": "JSON: schema name -> your column."})
    template: str = field(default="auto", metadata={"help": "auto, chat or plain."})
    people: int = field(default=20, metadata={"help": "Made-up people, in all."})
    forget_people: int = 2
    facts: int | None = field(default=None, metadata={"help": "Questions about each of them; None: all."})
    teach_epochs: float = field(default=0.0, metadata={"help": "> 0: fine-tune on both sets before forgetting."})
    teach_learning_rate: float = 1e-3
    trim_vocabulary: bool = field(default=False, metadata={"help": "Keep only the tokens of the data (CPU runs)."})
    original_dir: str | None = field(default=None, metadata={"help": "Keep the taught model here, for an audit."})
    retrained_dir: str | None = field(
        default=None,
        metadata={"help": "Teach the retain set alone, too, and keep that here: what an audit compares with."},
    )
    lora_rank: int = 16
    overwrite: bool = False


def lora(model: Any, rank: int) -> Any:
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def keep(model: Any, tokenizer: Any, folder: str) -> None:
    if PartialState().is_main_process:
        with written_aside(folder, overwrite=True) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments, args = parse_recipe(UnlearnArguments, UnlearningConfig, argv=argv)
    publish, args.push_to_hub = args.push_to_hub, False  # the whole result at the end, not the trainer's checkpoints
    out = refuse_existing_output(args.output_dir, overwrite=arguments.overwrite)
    record = RunRecord("unlearning", "recipes/unlearn.py", settings_of(arguments, args), seed=args.seed)
    work = training_folder(out, resume=bool(args.resume_from_checkpoint), overwrite=arguments.overwrite)
    args.output_dir = str(work / "checkpoints")
    set_seed(args.seed)
    splits = forget_retain_rows(
        arguments.forget_data, arguments.retain_data, columns=json.loads(arguments.columns), split=arguments.split,
        people=arguments.people, forget_people=arguments.forget_people, facts=arguments.facts, seed=args.seed,
    )  # fmt: skip
    with record.stage("load"):
        path = demo_model() if arguments.model_name_or_path == "demo" else arguments.model_name_or_path
        model, tokenizer = load_model(path, dtype=arguments.dtype), load_tokenizer(path)
        record.inputs.append(describe_input(path, model=model))
        texts = [str(value) for rows in splits.values() for row in rows for value in row.values()]
        if arguments.trim_vocabulary:
            model, tokenizer, _ = trim_vocabulary(model, tokenizer, texts)
    shared: dict[str, Any] = {"template": QuestionAnswerFormat(template=arguments.template)}
    if arguments.teach_epochs > 0:
        with record.stage("teach"):
            teaching = TrainingArguments(
                str(work / "teaching"), num_train_epochs=arguments.teach_epochs,
                learning_rate=arguments.teach_learning_rate, per_device_train_batch_size=8, seed=args.seed,
                lr_scheduler_type="cosine", warmup_steps=5, save_strategy="no", report_to="none", logging_steps=20,
            )  # fmt: skip

            def taught(model: Any, rows: Any) -> Any:
                learning = lora(model, arguments.lora_rank)
                train_on_answers(learning, tokenizer, rows, teaching, **shared)
                return learning.merge_and_unload()

            if arguments.retrained_dir is not None:
                keep(taught(copy.deepcopy(model), splits["retain"]), tokenizer, arguments.retrained_dir)
            model = taught(model, splits["forget"] + splits["retain"])
    if arguments.original_dir is not None:
        keep(model, tokenizer, arguments.original_dir)
    model = lora(model, arguments.lora_rank)
    trainer = UnlearningTrainer(
        model, args, forget_dataset=splits["forget"], retain_dataset=splits["retain"] or None,
        processing_class=tokenizer, **shared,
    )  # fmt: skip

    looks = {**shared, "accelerator": trainer.accelerator, "batch_size": 32}
    with record.stage("measure before"):
        before = forget_retain(model, tokenizer, splits, adapter="base", **looks)
    with record.stage("unlearn"):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint and last_checkpoint(args.output_dir))
    with record.stage("measure after"):
        after = forget_retain(model, tokenizer, splits, adapter="default", **looks)
    measured = {"before": before, "after": after}
    if trainer.is_world_process_zero():
        changed = arguments.teach_epochs > 0 or arguments.trim_vocabulary
        finish_run(
            out, record, measured, result="after", tokenizer=tokenizer, overwrite=arguments.overwrite,
            model=model.merge_and_unload() if changed else model,  # an adapter alone needs a base that others have
            push_to=args.hub_model_id or out.name if publish else None, private=args.hub_private_repo,
        )  # fmt: skip
    return measured


if __name__ == "__main__":
    main()
