"""What every stage of the quickstart is measured on: held-out text, the people to keep and the people to forget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_transfer_ext.adapters.transfer.travel import TRANSFER_FILE
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.language import measure_language_model
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.loading import load_model


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
