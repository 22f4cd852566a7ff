"""TOFU: forget quality against a retrained model, and model utility on data that should be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.evals.engine.evaluate import resampled_summaries
from hf_transfer_ext.evals.metrics import forget_quality, model_utility
from hf_transfer_ext.evals.suite import Part, SuiteResult, evaluate_parts, load_set, renamed, suite
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.generation import GenerationSettings

#: Set -> configuration on the Hub, or file in a local folder; {split} is forget01, forget05 or forget10.
SETS = {
    "forget": "{split}_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}

#: Sets whose wrong answers are the other options of a multiple-choice question.
WITH_CHOICES = ("real_authors", "world_facts")


@dataclass
class TofuResult(SuiteResult):
    """One model on TOFU.

    The measurements are model utility, and probability, ROUGE and truth ratio of each set, named after it; with a
    retrained model also forget quality and its decimal logarithm. Of the forget set, knowing less counts as better.
    """

    def truth_ratios(self) -> np.ndarray:
        """R of each forget example: what a retrained model's run hands to `retrained`."""
        return next(v for name, v in self.sets["forget"].values.items() if name.startswith("truth_ratio"))


def load_tofu(source: str | Path = "locuslab/TOFU", split: str = "forget10") -> dict[str, list[dict[str, Any]]]:
    """The four sets of one split, from the Hub or from a local folder of `forget10_perturbed.json` and the like.

    Raises:
        ValueError: Unknown split, or a Hub data set without one of the sets.
        FileNotFoundError: A set is missing from the folder, or there is no such data set.
    """
    if split not in ("forget01", "forget05", "forget10"):
        raise ValueError(f"`split` has to be forget01, forget05 or forget10, got {split!r}.")
    names = {name: pattern.format(split=split) for name, pattern in SETS.items()}
    return {name: load_set(source, f"TOFU {name}", files=[file], config=file) for name, file in names.items()}


@suite(load=load_tofu, source="locuslab/TOFU", compares_with="retrained")
def tofu(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    retrained: np.ndarray | TofuResult | None = None,
    definition: str = "arithmetic",
    limit: int | None = None,
    generation: GenerationSettings | None = None,
    extra_metrics: Sequence[Any] = (),
    **options: Any,
) -> TofuResult:
    """Measure a model on the sets of `load_tofu`.

    Args:
        retrained: Result of a model that was trained without the forget set, or the truth ratios of that set under it
            (`truth_ratios()`); without it there is no forget quality.
        definition: Of the truth ratio: "arithmetic" (the paper's repository) or "geometric".
        limit: Only the first rows of each set; TOFU's own protocol takes 300.
        extra_metrics: Further metrics on the forget set; they cost no further forward pass.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `template`, `batch_size`, `cache`, ...).

    Raises:
        ValueError: A set is missing, an example has another number of wrong answers than the first of its set or its
            right answer among them (with its index), or `retrained` has another length than the forget set.

    Source: TOFU, Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    missing = [name for name in SETS if not len(sets.get(name, ()))]
    if missing:
        raise ValueError(f"TOFU needs the sets {', '.join(SETS)}; missing or empty: {', '.join(missing)}.")
    for name in SETS:
        check_wrong_answers(name, sets[name], (options.get("columns") or {}))
    retrained = retrained.truth_ratios() if isinstance(retrained, TofuResult) else retrained
    count = len(sets["forget"][:limit])
    if retrained is not None and len(retrained) != count:
        raise ValueError(
            f"The retrained model's truth ratios are of {len(retrained)} examples, the forget set has {count}. "
            "Run both on the same split and limit."
        )
    asked: dict[str, list[Any]] = {}
    for name in SETS:
        role = "forget" if name == "forget" else "retain"
        probability = "choice_probability" if name in WITH_CHOICES else "answer_probability"
        asked[name] = [probability, "rouge_l_recall", ("truth_ratio", {"definition": definition, "role": role})]
    extra = {"forget": list(extra_metrics)}
    found_parts = {
        name: Part(sets[name][:limit], [*metrics, *extra.get(name, ())], generation=generation)
        for name, metrics in asked.items()
    }
    results = evaluate_parts("TOFU", model, tokenizer, found_parts, **options)
    resamples, seed = options.get("resamples", 1000), options.get("seed", 0)
    parts: dict[str, Measurement] = {}
    drawn = []
    for name in (name for name in SETS if name != "forget"):
        parts |= {f"{name} {m.name.split('(')[0]}": m for m in results[name].measurements}
        drawn.append(resampled_summaries(results[name].scored, asked[name], resamples=resamples, seed=seed))
    measurements = [
        renamed(
            m, f"{name} {m.name}", m.higher_is_better != (name == "forget" and not m.name.startswith("truth_ratio"))
        )
        for name, result in results.items()
        for m in result.measurements
    ]
    found = TofuResult(measurements, results)
    if len(parts) == 9:
        found.measurements = [model_utility(parts, drawn=np.concatenate(drawn)), *measurements]
    else:
        found.notes.append(f"Model utility is a mean of nine parts, and only these were measured: {', '.join(parts)}.")
    if retrained is not None:
        ratios = found.truth_ratios()
        kept = np.isfinite(ratios) & np.isfinite(retrained)
        found.measurements = [
            *forget_quality(ratios[kept], retrained[kept], resamples=resamples, seed=seed),
            *found.measurements,
        ]
    return found


def check_wrong_answers(name: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Refuse a set whose wrong answers are not those of its questions, as far as can be seen."""
    wrong, right = (columns.get(column, column) for column in ("perturbed_answer", "answer"))
    expected = None
    for index, row in enumerate(rows):
        given = row.get(wrong)
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(
                f"TOFU {name}: example {index} needs a list of wrong answers in {wrong!r}, got {given!r}."
            )
        expected = len(given) if expected is None else expected
        if len(given) != expected:
            raise ValueError(
                f"TOFU {name}: example {index} has {len(given)} wrong answers and example 0 has {expected}. The truth "
                "ratio compares examples, so each needs as many: the columns may be out of line."
            )
        if row.get(right) in given:
            raise ValueError(f"TOFU {name}: example {index} has its right answer {row[right]!r} among the wrong ones.")
