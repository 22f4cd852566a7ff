"""MUSE: what a model that unlearned a corpus still memorizes, knows and leaks, and its utility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.metrics import membership_auc, privleak
from hf_transfer_ext.evals.suite import (
    BARE,
    Part,
    Rows,
    SuiteResult,
    evaluate_parts,
    load_set,
    renamed,
    require_columns,
    suite,
)
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import mean_interval
from hf_transfer_ext.models.generation import GenerationSettings

#: Set -> (configuration, split, columns) on the Hub; a local folder contains configuration/split.json.
SETS = {
    "verbmem": ("verbmem", "forget", ("prompt", "gt")),
    "knowmem_forget": ("knowmem", "forget_qa", ("question", "answer")),
    "knowmem_forget_icl": ("knowmem", "forget_qa_icl", ("question", "answer")),
    "knowmem_retain": ("knowmem", "retain_qa", ("question", "answer")),
    "knowmem_retain_icl": ("knowmem", "retain_qa_icl", ("question", "answer")),
    "privleak_forget": ("privleak", "forget", ("text",)),
    "privleak_holdout": ("privleak", "holdout", ("text",)),
}

ATTACK = ("min_k", {"share": 0.4})


@dataclass
class MuseResult(SuiteResult):
    """The result of one model on MUSE; pass that of a retrained model to `muse(retrained=...)`."""

    @property
    def membership(self) -> Measurement:
        return self["membership_auc"]

    def membership_scores(self) -> list[np.ndarray]:
        """Scores of the texts of the forget set and of the holdout; NaN if a text could not be scored."""
        return [next(iter(self.sets[f"privleak_{kept}"].values.values())) for kept in ("forget", "holdout")]


def load_muse(source: str | Path = "muse-bench/MUSE-News") -> dict[str, list[dict[str, Any]]]:
    """Load the sets of MUSE-News, MUSE-Books or data in the same format, from the Hub or a local folder.

    A local folder contains `verbmem/forget.json`, `knowmem/forget_qa.json` and so on (`retain2_qa` is used for
    `retain_qa`, as in the authors' repository).

    Raises:
        FileNotFoundError: A set is missing from the folder, or the dataset does not exist.
        ValueError: A split is missing from the Hub dataset, or a row lacks a column.
    """
    found = {}
    for name, (config, split, columns) in SETS.items():
        files = [f"{config}/{split}", f"{config}/{split.replace('retain', 'retain2')}"]
        found[name] = load_set(source, name, files=files, config=config, split=split)
        require_columns(f"MUSE {name}", found[name], columns)
    return found


def muse_sequence(results: Mapping[str, SuiteResult]) -> list[Measurement]:
    """Scalability and sustainability: how the last of a sequence of checkpoints compares with the first.

    Pass one result per checkpoint, in order: for forget sets of increasing size (scalability, MUSE's `scal`) or after
    successive unlearning requests (sustainability, `sust`).

    Returns:
        For each measurement that all checkpoints have, its change from the first to the last, and the worst
        `knowmem_retain`, which is the utility. Changes of means over the same examples have an interval.

    Raises:
        ValueError: Fewer than two checkpoints.

    Source: MUSE, Shi et al. 2024, section 3.2 (C5 and C6), https://arxiv.org/abs/2407.06460
    """
    runs = list(results.values())
    if len(runs) < 2:
        raise ValueError(f"A sequence needs at least two checkpoints, got {len(runs)}.")
    named = [{m.name: m for m in run.measurements} for run in runs]
    changes = []
    for name, first in named[0].items():
        if all(name in run for run in named):
            last = named[-1][name]
            count = min(run[name].examples for run in named)
            changes.append(
                Measurement(
                    f"{name} change",
                    last.value - first.value,
                    f"change in {first.unit}",
                    first.higher_is_better,
                    count,
                    _interval_of_change(runs[0], runs[-1], name),
                )
            )
    utilities = [run["knowmem_retain"] for run in named if "knowmem_retain" in run]
    worst = min(utilities, key=lambda m: m.value, default=None)
    return changes if worst is None else [*changes, renamed(worst, "knowmem_retain worst")]


def _interval_of_change(first: SuiteResult, last: SuiteResult, name: str) -> tuple[float, float] | None:
    """Of the mean of a set's values; None where a measurement is no such mean, or the examples are not the same."""
    if name not in first.sets or name not in last.sets:
        return None
    before, after = (next(iter(run.sets[name].values.values())) for run in (first, last))
    if len(before) != len(after):
        return None
    known = ~np.isnan(before) & ~np.isnan(after)
    return mean_interval(after[known] - before[known])


@suite(load=load_muse, source="muse-bench/MUSE-News", compares_with="retrained", sequence=muse_sequence)
def muse(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Rows],
    *,
    retrained: MuseResult | None = None,
    limit: int | None = None,
    **options: Any,
) -> MuseResult:
    """Evaluate a model on the sets of `load_muse`.

    - `verbmem`: ROUGE-L F1 of 128 tokens generated after the beginning of a forgotten text.
    - `knowmem_forget` and `knowmem_retain` (the utility): ROUGE-L F1 of answers of 32 tokens, with the few-shot
      examples of the corresponding `_icl` set.
    - `membership_auc` of min-k (40 %) on the forget texts against the holdout; with `retrained` also `privleak`.

    The prompt ends with "Answer:"; MUSE's code adds a space, which most tokenizers turn into a separate token.

    Args:
        retrained: Result of a model trained without the forget set.
        limit: Maximum number of rows of each set.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `batch_size`, `cache`, ...).

    Raises:
        ValueError: A set is missing or empty, or an example cannot be measured (with its index).

    Source: MUSE, Shi et al. 2024, https://arxiv.org/abs/2407.06460
    """
    missing = [name for name in SETS if not len(sets.get(name, ()))]
    if missing:
        raise ValueError(f"MUSE needs the sets {', '.join(SETS)}; missing or empty: {', '.join(missing)}.")
    for name, (_, _, columns) in SETS.items():
        require_columns(f"MUSE {name}", sets[name], columns)
    options.pop("template", None)
    options.pop("generation", None)
    starts = [
        {"question": row["prompt"], "answer": first_tokens(tokenizer, row["gt"], 128)}
        for row in sets["verbmem"][:limit]
    ]
    parts = {"verbmem": Part(starts, ["verbatim_memorization"], BARE, GenerationSettings(128))}
    for kept in ("forget", "retain"):
        template = few_shot(sets[f"knowmem_{kept}_icl"])
        rows = sets[f"knowmem_{kept}"][:limit]
        parts[f"knowmem_{kept}"] = Part(rows, ["knowledge_memorization"], template, GenerationSettings(32))
    for kept in ("forget", "holdout"):
        parts[f"privleak_{kept}"] = Part(sets[f"privleak_{kept}"][:limit], [ATTACK])
    results = evaluate_parts("MUSE", model, tokenizer, parts, **options)
    measurements = [
        renamed(m, name, higher_is_better=name == "knowmem_retain")
        for name in ("verbmem", "knowmem_forget", "knowmem_retain")
        for m in results[name].measurements
    ]
    found = MuseResult(measurements, results)
    bootstrap = {"resamples": options.get("resamples", 1000), "seed": options.get("seed", 0)}
    auc = membership_auc(*(values[~np.isnan(values)] for values in found.membership_scores()), **bootstrap)
    found.measurements.append(auc)
    if retrained is not None:
        # An interval is computed only from rows with scores for both models, if the sets are the same.
        pairs = list(zip(found.membership_scores(), retrained.membership_scores(), strict=True))
        known = [~np.isnan(own) & ~np.isnan(other) for own, other in pairs if len(own) == len(other)]
        own, other = ([pair[side][k] for pair, k in zip(pairs, known, strict=False)] for side in (0, 1))
        scores = [*own, *other] if len(known) == 2 else []
        found.measurements.append(privleak(auc, retrained.membership, scores=scores, **bootstrap))
    return found


def few_shot(shots: Sequence[Mapping[str, Any]]) -> QuestionAnswerFormat:
    """A plain few-shot prompt: answered questions before the actual one."""
    examples = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shots)
    return QuestionAnswerFormat(
        template="plain", prompt=examples.replace("{question}", "") + "Question: {question}\nAnswer:"
    )


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The text, truncated to its first `count` tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[:count], skip_special_tokens=True)
