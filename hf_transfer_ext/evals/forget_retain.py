"""A quick evaluation of forgetting and retention, for a model before or after unlearning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.measurement import Measurement


def forget_retain(
    model: Any, tokenizer: Any, splits: Mapping[str, Sequence[Mapping[str, Any]]], **options: Any
) -> list[Measurement]:
    """Compute answer probability and perplexity of every split, extraction strength of "forget", and truth ratios.

    Args:
        splits: "forget" and any others ("retain", "holdout", "forget_languages"); empty ones are skipped. Truth
            ratios are computed if all rows of a split have wrong answers (`perturbed_answer`), with the role "forget"
            for "forget" and its facets ("forget_...") and "retain" for the others.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `template`, `columns`, `batch_size`, ...).

    Returns:
        The measurements, with the split prepended to their names ("forget answer_probability"). On "forget" and its
        facets, knowing less counts as better.
    """
    perturbed = (options.get("columns") or {}).get("perturbed_answer", "perturbed_answer")
    found = []
    for split, rows in splits.items():
        if not len(rows):
            continue
        metrics: list[Any] = ["answer_probability", "perplexity"]
        forgets = split.split("_")[0] == "forget"
        if split == "forget":
            metrics.append("extraction_strength")
        if all(row.get(perturbed) for row in rows):
            metrics.append(("truth_ratio", {"role": "forget" if forgets else "retain"}))
        result = evaluate(model, tokenizer, rows, metrics, dataset=f"{split} set", **options)
        for m in result.measurements:
            knows = forgets and not m.name.startswith("truth_ratio")
            better = m.higher_is_better != knows
            found.append(replace(m, name=f"{split} {m.name}", higher_is_better=better))
    return found
