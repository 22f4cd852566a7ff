"""Make a language model forget: `accelerate launch recipes/unlearn.py --config recipes/configs/unlearn/demo.yaml`.

Trains a LoRA that forgets one set of questions and answers and keeps another, measures both before and after, and
saves the result with its card and record. Without data of your own it teaches the model fictitious people first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer_ext.data.forget_retain import learned_rows
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.forget_retain import forget_retain
from hf_transfer_ext.files import refuse_existing_output, refuse_shared_outputs
from hf_transfer_ext.hub.record import describe_dataset
from hf_transfer_ext.recipe import parse_recipe, setting
from hf_transfer_ext.recipes.curve import curve_of
from hf_transfer_ext.recipes.forget_retain import ForgetRetainArguments
from hf_transfer_ext.recipes.restoration import restoration_of, texts_of
from hf_transfer_ext.recipes.run import TRAINER_GROUPS, load_named, packed, run_recipe
from hf_transfer_ext.recipes.teaching import teach
from hf_transfer_ext.recipes.training import start_training
from hf_transfer_ext.settings import REQUIRED
from hf_transfer_ext.students.vocabulary import trim_vocabulary
from hf_transfer_ext.trainers.logs import curve_notes
from hf_transfer_ext.trainers.saving import refuse_sharding, whole_model
from hf_transfer_ext.trainers.taught import lora_config
from hf_transfer_ext.trainers.unlearning import UnlearningConfig, UnlearningTrainer


@dataclass
class UnlearnArguments(ForgetRetainArguments):
    """Which data to forget, and the model to unlearn it from. The training itself is set by `UnlearningConfig`."""

    model_name_or_path: str = setting(REQUIRED, "model", "Folder, Hub id, or demo (Gemma 3 270M).")
    revision: str | None = setting(None, "model", "Hub revision.")
    dtype: str = setting("float32", "model", "auto, float32 or bfloat16.")
    four_bit: bool = setting(False, "model", "Load it in 4 bits (QLoRA, through bitsandbytes).")
    lora_rank: int = setting(16, "model", "Rank of the LoRA that forgets, and of the one that teaches.")
    trim_vocabulary: bool = setting(False, "model", "Keep only the tokens of the data (CPU runs).")
    split: str = setting("train", "data", "Split of both.")
    teach_epochs: float = setting(0.0, "teach", "> 0: fine-tune on both sets before forgetting.")
    teach_learning_rate: float = setting(1e-3, "teach", "Peak learning rate of that.")
    original_dir: str | None = setting(None, "teach", "Save the taught model here, for an audit.")
    retrained_dir: str | None = setting(None, "teach", "Also teach the retain set alone and save that model here.")
    corrupt_epochs: float = setting(0.0, "restor", "> 0: fine-tune on false answers first, and forget these (RESTOR).")
    corrupt_learning_rate: float = setting(1e-3, "restor", "Peak learning rate of that.")
    corrupted_dir: str | None = setting(None, "restor", "Save the corrupted model here.")
    restor_data: str | None = setting(None, "restor", "Folder of RESTOR's facts, if the forget data are false.")
    restor_options: dict[str, Any] = setting({}, "restor", "Of the options of facts: {corruption: mix_a2, shots: 2}.")
    curve: dict[str, Any] = setting({}, "training", "With `eval_strategy`: {limit: 64, retrained: FOLDER}.")
    overwrite: bool = setting(False, "training", "Replace a result that is there.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    job, args = parse_recipe(UnlearnArguments, UnlearningConfig, argv=argv, groups=TRAINER_GROUPS)
    read = (job.model_name_or_path, job.forget_data, job.retain_data, job.restor_data)
    if job.four_bit and (job.teach_epochs > 0 or job.corrupt_epochs > 0 or job.trim_vocabulary):
        raise ValueError("`four_bit` packs what teaching, corrupting and `trim_vocabulary` change: do that first.")
    if job.teach_epochs > 0 or job.corrupt_epochs > 0 or job.trim_vocabulary:
        refuse_sharding(args, "Teach, corrupt and trim in one process first, and unlearn the result.")
    run = start_training("unlearning", __file__, argv, job, args, overwrite=job.overwrite, inputs=read)
    folders = (job.original_dir, job.retrained_dir, job.corrupted_dir)
    refuse_shared_outputs(run.out, *folders)
    for folder in filter(None, folders):
        refuse_existing_output(folder, overwrite=run.replaces, inputs=read)
    record = run.record
    splits = job.rows(record, args.seed, split=job.split)
    learned = {part: learned_rows(splits, part) for part in ("forget", "retain")}
    template = QuestionAnswerFormat(template=job.template)
    restoration = restoration_of(run, job, learned["forget"], template)
    record.inputs += [describe_dataset(name) for name in (job.restor_data,) if name]
    with record.stage("load"):
        how = packed(job.four_bit, args)
        model, tokenizer = load_named(job.model_name_or_path, record, revision=job.revision, dtype=job.dtype, **how)
        if job.trim_vocabulary:
            model, tokenizer, _ = trim_vocabulary(model, tokenizer, texts_of(splits, restoration))
    if job.teach_epochs > 0:
        with record.stage("teach"):
            model = teach(run, job, model, tokenizer, learned, template)
    elif job.retrained_dir or job.original_dir:
        raise ValueError("`original_dir` and `retrained_dir` save models taught here: set `teach_epochs` too.")
    if restoration is not None:
        with record.stage("corrupt"):
            model = restoration.corrupt(model, tokenizer)
        splits["forget"] = learned["forget"] = restoration.false_rows
    sets: Any = {"forget_dataset": learned["forget"], "retain_dataset": learned["retain"] or None}
    sets |= {"peft_config": lora_config(job.lora_rank), "processing_class": tokenizer, "template": template}
    trainer = UnlearningTrainer(model, args, **sets, callbacks=curve_of(run, job, splits, tokenizer, template))
    with record.stage("unlearn"):
        trainer.train(resume_from_checkpoint=run.checkpoint)
        model = whole_model(trainer, run.work / "unlearned", dtype=job.dtype, **how)
    options: Any = {"template": template, "accelerator": trainer.accelerator, "batch_size": 32}
    measured: dict[str, list[Any]] = {}
    for name, adapter in (("before", "base"), ("after", "default")):
        with record.stage(f"measure {name}"):
            measured[name] = forget_retain(model, tokenizer, splits, adapter=adapter, **options)
    if restoration is not None:
        measured = restoration.added_to(measured, model, tokenizer, **options)
    if trainer.is_world_process_zero():
        record.notes |= curve_notes(trainer.state.log_history)
        changed = job.teach_epochs > 0 or restoration is not None or job.trim_vocabulary  # others lack that base
        run.finish(measured, "after", model.merge_and_unload() if changed else model, tokenizer, trainer)
    return measured


if __name__ == "__main__":
    run_recipe("unlearn", main)
