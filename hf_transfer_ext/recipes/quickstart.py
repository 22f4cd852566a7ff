"""The whole chain in one command: `accelerate launch recipes/quickstart.py`.

A teacher is distilled into a student, and a LoRA of it moves there. The student learns made-up people; the update is
extracted as a LoRA; both are merged; the merged model unlearns some people, and its copy with noise is distilled from
it, so that less of them can be brought back. The last record holds the whole chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.text import load_train_and_test
from hf_transfer_ext.files import refuse_existing_output
from hf_transfer_ext.hub.card import kind_of
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.record import describe_input, read_record
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.merging import merge
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.recipe import CONFIGS, parse_recipe, setting
from hf_transfer_ext.recipes import distill, robustify, transfer_lora, unlearn
from hf_transfer_ext.recipes.chain import STAGES, measure_stage, with_people, write_people
from hf_transfer_ext.recipes.publishing import PublishArguments, publish_stages
from hf_transfer_ext.recipes.run import DEMO, as_words, run_recipe, start_record


@dataclass
class QuickstartArguments(PublishArguments):
    """How much of everything; the stages' own settings are in the package's configurations."""

    output_dir: str = setting("runs/quickstart", "", "Folder of all stages.")
    overwrite: bool = setting(False, "", "Replace stages that are there.")
    teacher: str = setting(DEMO, "distill", "Folder, Hub id, or demo (Gemma 3 270M).")
    dataset: str = setting("facts", "distill", "File, folder, Hub id, or facts (made from packages).")
    student_layers: int = setting(8, "distill", "Depth of the student.")
    teach_steps: int = setting(25, "distill", "Steps of fine-tuning the teacher first.")
    distill_steps: int = setting(40, "distill", "Steps of distillation.")
    task_people: int = setting(18, "transfer", "Made-up people whose statements the LoRA that moves sorts.")
    people: int = setting(6, "people", "Made-up people, in all.")
    forget_people: int = setting(2, "people", "Of these, the ones to forget.")
    facts: int = setting(4, "people", "Questions about each of the people.")
    learn_epochs: float = setting(8.0, "people", "Epochs of fine-tuning on the people.")
    rehearsed: int = setting(48, "people", "Training texts repeated beside the people.")
    rank: int = setting(32, "people", "Rank of the extracted LoRA.")
    forget_epochs: float = setting(5.0, "people", "Epochs of unlearning.")
    robust_epochs: float = setting(12.0, "people", "Epochs of distilling the unlearned model again.")
    test_rows: int = setting(32, "", "Held-out rows to measure on.")
    seed: int = setting(0, "", "Seed of all random choices.")


def main(argv: list[str] | None = None) -> dict[str, list[Measurement]]:
    (job,) = parse_recipe(QuickstartArguments, argv=argv)
    publication = job.publication(several=True)
    root, student = Path(job.output_dir), Path(job.output_dir) / "student"
    for folder in STAGES:
        refuse_existing_output(root / folder, overwrite=job.overwrite, inputs=(job.teacher, job.dataset))
    chain = start_record("quickstart", __file__, argv, job, seed=job.seed)
    people = fictitious_people(job.people, forget=job.forget_people, holdout=0, facts=job.facts, seed=job.seed)
    train, test = load_train_and_test(job.dataset)
    measured: dict[str, list[Measurement]] = {}

    def measure(title: str, name: str) -> None:
        """Measure a stage's folder, and put the result into its card."""
        found = measure_stage(root / name, load_tokenizer(student), people, test, job.test_rows, job.dataset)
        measured[title], record = found, read_record(root / name)
        chain.stages += record.stages
        if name in ("learnt", "adapter", "merged"):
            record.metrics += found
            finish_run(root / name, record, quiet=True)

    shared = ("teacher", "dataset", "student_layers", "teach_steps", "test_rows", "seed")
    same: Any = {name: getattr(job, name) for name in shared} | {"max_steps": job.distill_steps, "overwrite": True}
    same |= {"output_dir": student, "compare_with_ce": False}
    distill.main(as_words(config=CONFIGS / "distill" / "quickstart.yaml", **same))
    measure("student", "student")

    teacher = root / "student.training" / "teacher" if job.teach_steps > 0 else job.teacher
    same = {"source_base": teacher, "adapter": root / "lora", "target_base": student, "seed": job.seed}
    same |= {"people": job.task_people, "output_dir": root / "moved", "overwrite": True}
    transfer_lora.main(as_words(config=CONFIGS / "transfer" / "quickstart.yaml", **same))
    measure("moved LoRA", "moved")

    record = start_record("fine-tuning", __file__, argv, job, seed=job.seed)
    record.inputs.append(describe_input(student, role="base"))
    with record.stage("learn people"):
        rehearsed, how = islice(train, job.rehearsed), {"epochs": job.learn_epochs, "seed": job.seed}
        learnt, tokenizer = with_people(student, people, rehearsed, root / "learnt.training", **how)
    finish_run(root / "learnt", record, model=learnt, tokenizer=tokenizer, overwrite=True, quiet=True)
    measure("+ people", "learnt")

    extract_lora(student, root / "learnt", root / "adapter", rank=job.rank, modules_to_save=True, overwrite=True)
    measure("student + LoRA", "adapter")
    models = [str(root / "learnt"), f"{student}+{root / 'adapter'}"]
    parents = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    plan = {"merge_method": "task_arithmetic", "base_model": str(student), "models": parents}
    merge({**plan, "dtype": "float32"}, root / "merged", overwrite=True)
    measure("merged", "merged")

    data: Any = write_people(people, root) | {"seed": job.seed, "overwrite": True}
    what = {"model_name_or_path": root / "merged", "num_train_epochs": job.forget_epochs, **data}
    unlearn.main(as_words(config=CONFIGS / "unlearn" / "quickstart.yaml", output_dir=root / "unlearned", **what))
    measure("unlearned", "unlearned")
    what |= {"model_name_or_path": root / "unlearned", "num_train_epochs": job.robust_epochs, "texts": job.dataset}
    robustify.main(as_words(config=CONFIGS / "robustify" / "quickstart.yaml", output_dir=root / "robust", **what))
    measure("robust", "robust")

    finish_run(root, chain, measured, plot="quickstart.png")
    publish_stages(publication, root, STAGES)
    jobs = [kind_of(one) for one in read_record(root / "robust").history()]
    print(f"The record of {root / 'robust'} holds the chain: {' -> '.join(jobs)}.")
    return measured


if __name__ == "__main__":
    run_recipe("quickstart", main)
