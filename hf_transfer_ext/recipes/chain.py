"""The stages of the quickstart: what each is measured on, how the student learns the people, and their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_transfer_ext.adapters.transfer.travel import TRANSFER_FILE
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.language import as_example, measure_language_model
from hf_transfer_ext.files import write_text
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.trainers.taught import taught, teaching_arguments

#: Folders of the stages, in the folder of the run and in the repository that it is published in.
STAGES = ("student", "lora", "moved", "learnt", "adapter", "merged", "unlearned", "robust")


def with_people(
    student: Path, people: Mapping[str, list[dict[str, Any]]], rehearsed: Iterable[Any], work: Path, **how: Any
) -> tuple[Any, Any]:
    """(model, tokenizer): the student fine-tuned on both groups of people, and on texts of its earlier training.

    Args:
        rehearsed: These texts: fine-tuning on the people alone would overwrite the facts.
        how: `epochs` and `seed`.
    """
    model, tokenizer = load_model(student), load_tokenizer(student)
    args = teaching_arguments(work, **how, learning_rate=3e-4, logging_steps=10)
    rehearsal = [as_example(row, tokenizer) for row in rehearsed]
    rows = [*people["forget"], *people["retain"], *rehearsal]
    return taught(model, tokenizer, rows, args, lora_rank=None), tokenizer


def write_people(people: Mapping[str, list[dict[str, Any]]], root: Path) -> dict[str, Path]:
    """`forget.jsonl` and `retain.jsonl` in a folder, as the settings `forget_data` and `retain_data` of the stages."""
    files = {f"{part}_data": root / f"{part}.jsonl" for part in ("forget", "retain")}
    for name, path in files.items():
        rows = people[name.removesuffix("_data")]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return files


def measure_stage(
    folder: Path, tokenizer: Any, people: Mapping[str, list[dict[str, Any]]], test: Any, limit: int, dataset: str
) -> list[Measurement]:
    """The measurements of a model folder; of a moved adapter those that its own job made, on its own task.

    Perplexity on the first `limit` rows of the held-out text, and what the model knows of both groups of people.
    """
    if (folder / TRANSFER_FILE).is_file():
        return read_record(folder).metrics
    model = load_model(folder)
    found = measure_language_model(model, tokenizer, test or [], limit=limit, dataset=dataset)[:1]
    for part, group in (("retain", "people to keep"), ("forget", "people to forget")):
        metrics, keep = ["answer_probability", "extraction_strength"], part == "retain"
        result = evaluate(model, tokenizer, people[part], metrics, dataset=group)
        found += [replace(m, name=f"{group}: {m.name}", higher_is_better=keep) for m in result.measurements]
    return found
