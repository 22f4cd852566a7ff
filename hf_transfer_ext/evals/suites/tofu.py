"""TOFU: forget quality compared with a retrained model, and model utility on data to retain."""

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
    """The result of one model on TOFU.

    The measurements are model utility, and probability, ROUGE and truth ratio of each set, with the set in their
    names; with a retrained model, also forget quality and its decimal logarithm. On the forget set, knowing less
    counts as better.
    """

    def truth_ratios(self) -> np.ndarray:
        """R of each forget example; those of a retrained model can be passed as `retrained`."""
        return next(v for name, v in self.sets["forget"].values.items() if name.startswith("truth_ratio"))


def load_tofu(source: str | Path = "locuslab/TOFU", split: str = "forget10") -> dict[str, list[dict[str, Any]]]:
    """Load the four sets of one split, from the Hub or from a local folder with `forget10_perturbed.json` and so on.

    Raises:
        ValueError: Unknown split, or a Hub dataset without one of the sets.
        FileNotFoundError: A set is missing from the folder, or the dataset does not exist.
    """
    if split not in ("forget01", "forget05", "forget10"):
        raise ValueError(f"`split` must be forget01, forget05 or forget10, got {split!r}.")
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
    """Evaluate a model on the sets of `load_tofu`.

    Args:
        retrained: Result of a model trained without the forget set, or its truth ratios on that set
            (`truth_ratios()`); without it, there is no forget quality.
        definition: Definition of the truth ratio: "arithmetic" (the paper's repository) or "geometric".
        limit: Maximum number of rows of each set; TOFU's protocol uses 300.
        extra_metrics: Additional metrics on the forget set; they do not need another forward pass.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `template`, `batch_size`, `cache`, ...).

    Raises:
        ValueError: A set is missing, an example has a different number of wrong answers than the first of its set or
            its correct answer among them (with its index), or `retrained` does not have the length of the forget set.

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
            f"The retrained model has truth ratios of {len(retrained)} examples, but the forget set has {count}. "
            "Run both on the same split with the same limit."
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
        found.notes.append(f"Model utility is a mean of nine parts, but only these were measured: {', '.join(parts)}.")
    if retrained is not None:
        ratios = found.truth_ratios()
        kept = np.isfinite(ratios) & np.isfinite(retrained)
        found.measurements = [
            *forget_quality(ratios[kept], retrained[kept], resamples=resamples, seed=seed),
            *found.measurements,
        ]
    return found


def check_wrong_answers(name: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Refuse a set whose wrong answers are visibly inconsistent with its questions."""
    wrong, right = (columns.get(column, column) for column in ("perturbed_answer", "answer"))
    expected = None
    for index, row in enumerate(rows):
        answers = row.get(wrong)
        if not isinstance(answers, (list, tuple)) or not answers:
            raise ValueError(
                f"TOFU {name}: example {index} needs a list of wrong answers in {wrong!r}, got {answers!r}."
            )
        expected = len(answers) if expected is None else expected
        if len(answers) != expected:
            raise ValueError(
                f"TOFU {name}: example {index} has {len(answers)} wrong answers but example 0 has {expected}. The "
                "truth ratio compares examples, so all need the same number: the columns may be misaligned."
            )
        if row.get(right) in answers:
            raise ValueError(f"TOFU {name}: example {index} has its answer {row[right]!r} among the wrong ones.")
