"""Compute metrics on several datasets, for several models in turn: the counterpart of `suite_run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.evals.engine.evaluate import MetricSpec, evaluate, resolve_metric
from hf_transfer_ext.evals.engine.result import EvaluationResult

#: Dataset name for fictitious people.
PEOPLE = "fictitious_people"

#: Metrics of a run that names none.
USUAL = ["perplexity", "answer_probability", "truth_ratio", "exact_memorization", "extraction_strength"]


def load_sets(
    names: Sequence[str], *, limit: int | None = None, seed: int = 0, **where: Any
) -> dict[str, list[dict[str, Any]]]:
    """Name -> the first `limit` rows of each dataset; `fictitious_people` gives sets about twenty people.

    Args:
        where: `split`, `revision` and `config_name` of all other datasets.
    """
    sets: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        sets |= fictitious_people(20, seed=seed) if name == PEOPLE else {Path(name).stem: load_rows(name, **where)}
    return {name: rows[:limit] for name, rows in sets.items()}


def resolve_all(metrics: Sequence[MetricSpec]) -> None:
    """Raise `ValueError` for an unknown metric or option, before anything is loaded."""
    for spec in metrics:
        resolve_metric(spec)


class MetricRun:
    """Holds the datasets while models are loaded and evaluated in turn.

    Args:
        metrics: Names, or names with options.
        sets: Name -> examples.
        reference: Model that comparing metrics use, or "base".
        options: Other arguments of `evaluate`.

    Raises:
        ValueError: An unknown metric or option, before a model is loaded.
    """

    def __init__(
        self,
        metrics: Sequence[MetricSpec],
        sets: Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        reference: Any = None,
        **options: Any,
    ) -> None:
        resolve_all(metrics)
        self.metrics, self.sets = metrics, sets
        self.options = {**options, "reference": reference}

    def results_by_folder(
        self, model: Any, tokenizer: Any, title: str, adapter: str | None = None
    ) -> Iterator[tuple[str, EvaluationResult]]:
        """Folder name and result of each dataset; the dataset name is prepended to the measurement names."""
        for dataset, rows in self.sets.items():
            result = evaluate(model, tokenizer, rows, self.metrics, adapter=adapter, dataset=dataset, **self.options)
            result.measurements = [replace(m, name=f"{dataset} {m.name}") for m in result.measurements]
            yield f"{title}/{dataset}", result
