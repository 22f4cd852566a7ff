"""The whole chain in one command: `accelerate launch recipes/quickstart.py`.

A teacher is distilled into a student; the student learns people who do not exist; what it learnt is extracted as a
LoRA and put on the student as it was before; both are merged; and the merged model forgets some of the people. Every
stage is a folder with a card and a record, the last record tells the whole chain, and one table compares them all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import distill
import unlearn
from transformers import TrainingArguments

from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.text import load_text_dataset
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.language import as_example, measure_language_model
from hf_transfer_ext.evals.table import comparison_plot, comparison_table
from hf_transfer_ext.files import refuse_existing_output, write_text, written_aside
from hf_transfer_ext.hub.finish import stage_table
from hf_transfer_ext.hub.publish import save_result
from hf_transfer_ext.hub.record import RunRecord, Stage, describe_input, read_record
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.merging import merge
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import parse_recipe, settings_of
from hf_transfer_ext.trainers.answers import train_on_answers

CONFIGS = Path(__file__).parent / "configs"
PEOPLE_METRICS = ["answer_probability", "extraction_strength"]


@dataclass
class QuickstartArguments:
    """How much of everything; the stages' own settings are in `recipes/configs`."""

    output_dir: str = "runs/quickstart"
    overwrite: bool = False
    teacher: str = field(default="demo", metadata={"help": "Folder, Hub id, or demo (Gemma 3 270M)."})
    dataset: str = field(default="facts", metadata={"help": "What the teacher teaches."})
    student_layers: int = 8
    teach_steps: int = 25
    distill_steps: int = 40
    people: int = 6
    forget_people: int = 2
    facts: int = field(default=4, metadata={"help": "Questions about each of the people."})
    learn_epochs: float = 8.0
    rehearsed: int = field(default=48, metadata={"help": "Training texts repeated beside the people."})
    rank: int = field(default=32, metadata={"help": "Rank of the extracted LoRA."})
    forget_epochs: float = 5.0
    test_rows: int = 32
    seed: int = 0


def main(argv: list[str] | None = None) -> dict[str, list[Measurement]]:
    (told,) = parse_recipe(QuickstartArguments, argv=argv)
    root = Path(told.output_dir)
    for folder in ("student", "learnt", "adapter", "merged", "unlearned"):
        refuse_existing_output(root / folder, overwrite=told.overwrite)
    settings, seed = settings_of(told), told.seed
    people = fictitious_people(told.people, forget=told.forget_people, holdout=0, facts=told.facts, seed=seed)
    test = load_text_dataset(told.dataset, split="test")
    stages: list[Stage] = []
    measured: dict[str, list[Measurement]] = {}

    def started(job: str, *inputs: tuple[str, str]) -> RunRecord:
        described = [describe_input(root / name, role=role) for name, role in inputs]
        return RunRecord(job, "recipes/quickstart.py", settings, inputs=described, seed=seed)

    def measure(name: str, folder: Path) -> list[Measurement]:
        model, tokenizer = load_model(folder), load_tokenizer(root / "student")
        found = measure_language_model(model, tokenizer, test, limit=told.test_rows, dataset=told.dataset)[:1]
        for part, title in (("retain", "people to keep"), ("forget", "people to forget")):
            result = evaluate(model, tokenizer, people[part], PEOPLE_METRICS, dataset=title)
            keep = part == "retain"
            found += [replace(m, name=f"{title}: {m.name}", higher_is_better=keep) for m in result.measurements]
        measured[name] = found
        return found

    def saved(record: RunRecord, name: str, title: str, **model: Any) -> None:
        record.metrics = measure(title, model.pop("measured_at", root / name))
        save_result(root / name, record=record, overwrite=True, **model)
        stages.extend(record.stages)

    distill.main([
        "--config", str(CONFIGS / "distill/demo.yaml"), "--output_dir", str(root / "student"), "--overwrite", "true",
        "--teacher", told.teacher, "--dataset", told.dataset, "--student_layers", str(told.student_layers),
        "--teach_steps", str(told.teach_steps), "--max_steps", str(told.distill_steps), "--seed", str(seed),
        "--compare_with_ce", "false", "--test_rows", str(told.test_rows),
    ])  # fmt: skip
    stages += read_record(root / "student").stages
    measure("student", root / "student")
    tokenizer = load_tokenizer(root / "student")

    record = started("fine-tuning", ("student", "base"))
    with record.stage("learn people"):
        learnt = load_model(root / "student")
        args = TrainingArguments(
            str(root / "learnt.training"), learning_rate=3e-4, num_train_epochs=told.learn_epochs,
            per_device_train_batch_size=8, save_strategy="no", report_to="none", seed=seed, logging_steps=10,
        )  # fmt: skip
        known = islice(load_text_dataset(told.dataset, split="train"), told.rehearsed)
        rehearsal = [as_example(row, tokenizer) for row in known]  # or the people would drive the facts out
        train_on_answers(learnt, tokenizer, people["forget"] + people["retain"] + rehearsal, args)
    with written_aside(root / "learnt", overwrite=True) as aside:
        learnt.save_pretrained(aside)
    saved(record, "learnt", "+ people", tokenizer=tokenizer)

    record = started("extraction", ("student", "base"), ("learnt", "model"))
    with record.stage("extract the LoRA"):
        report = extract_lora(root / "student", root / "learnt", root / "adapter", rank=told.rank, overwrite=True)
        record.config["residual_energy"] = report.residual_energy
    saved(record, "adapter", "student + LoRA")

    record = started("merging", ("student", "base"), ("learnt", "model"), ("adapter", "model"))
    with record.stage("merge"):
        models = [str(root / "learnt"), f"{root / 'student'}+{root / 'adapter'}"]
        plan = {
            "merge_method": "task_arithmetic",
            "base_model": str(root / "student"),
            "models": [{"model": model, "parameters": {"weight": 0.5}} for model in models],
            "dtype": "float32",
        }
        merge(plan, root / "merged", overwrite=True)
    saved(record, "merged", "merged", tokenizer=tokenizer)

    for part in ("forget", "retain"):
        write_text(root / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in people[part]))
    unlearn.main([
        "--output_dir", str(root / "unlearned"), "--model_name_or_path", str(root / "merged"), "--overwrite", "true",
        "--forget_data", str(root / "forget.jsonl"), "--retain_data", str(root / "retain.jsonl"), "--method", "npo",
        "--num_train_epochs", str(told.forget_epochs), "--learning_rate", "3e-4", "--alpha", "15",
        "--per_device_train_batch_size", "4", "--save_strategy", "no", "--report_to", "none", "--seed", str(seed),
    ])  # fmt: skip
    stages += read_record(root / "unlearned").stages
    measure("unlearned", root / "unlearned")

    print(comparison_table(measured), stage_table(stages), sep="\n\n")
    comparison_plot(measured, root / "quickstart.png", title="One chain, stage by stage")
    jobs = [one.job for one in read_record(root / "unlearned").history()]
    print(f"The record of {root / 'unlearned'} tells the chain: {' -> '.join(jobs)}.")
    return measured


if __name__ == "__main__":
    main()
