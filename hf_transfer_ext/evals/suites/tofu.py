"""TOFU: forget quality against a retrained model, and model utility on what was to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.evals.engine import EvaluationResult, GenerationSettings, evaluate, measure
from hf_transfer_ext.evals.measurement import Measurement
from hf_transfer_ext.evals.metrics import forget_quality, model_utility

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
class TofuResult:
    """One model on TOFU.

    Args:
        measurements: Model utility and its nine parts, the forget set's truth ratio, probability and ROUGE; with a
            retrained model also forget quality and its decimal logarithm.
        sets: The evaluations behind them, by set.
    """

    measurements: list[Measurement]
    sets: dict[str, EvaluationResult]

    def truth_ratios(self) -> np.ndarray:
        """R of each forget example: what a retrained model's run hands to `retrained`."""
        return next(v for name, v in self.sets["forget"].values.items() if name.startswith("truth_ratio"))


def load_tofu(source: str | Path = "locuslab/TOFU", split: str = "forget10") -> dict[str, list[dict[str, Any]]]:
    """The four sets of one split, from the Hub or from a local folder of `forget10_perturbed.json` and the like.

    Raises:
        ValueError: Unknown split.
        FileNotFoundError: A set is missing.
    """
    if split not in ("forget01", "forget05", "forget10"):
        raise ValueError(f"`split` has to be forget01, forget05 or forget10, got {split!r}.")
    names = {name: pattern.format(split=split) for name, pattern in SETS.items()}
    if not Path(source).is_dir():
        return {name: load_rows(source, config_name=config) for name, config in names.items()}
    found = {}
    for name, file in names.items():
        path = next((p for p in (Path(source) / f"{file}.json", Path(source) / f"{file}.jsonl") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"The TOFU set {name!r} is missing: no {file}.json in {str(source)!r}.")
        found[name] = load_rows(path)
    return found


def tofu(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    retrained: np.ndarray | None = None,
    definition: str = "arithmetic",
    limit: int | None = None,
    generation: GenerationSettings | None = None,
    extra_metrics: Sequence[Any] = (),
    **options: Any,
) -> TofuResult:
    """Measure a model on the sets of `load_tofu`.

    Args:
        retrained: Truth ratios of the forget set under a model that was trained without it (`truth_ratios()` of its
            own run); without it there is no forget quality.
        definition: Of the truth ratio: "arithmetic" (the paper's repository) or "geometric".
        limit: Only the first rows of each set; TOFU's own protocol takes 300.
        extra_metrics: Further metrics on the forget set; they cost no further forward pass.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `template`, `batch_size`, `cache`, ...).

    Raises:
        ValueError: A set is missing, or `retrained` has another length than the forget set.

    Source: TOFU, Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    missing = [name for name in SETS if not len(sets.get(name, ()))]
    if missing:
        raise ValueError(f"TOFU needs the sets {', '.join(SETS)}; missing or empty: {', '.join(missing)}.")
    count = len(sets["forget"][:limit])
    if retrained is not None and len(retrained) != count:
        raise ValueError(
            f"The retrained model's truth ratios are of {len(retrained)} examples, the forget set has {count}. "
            "Run both on the same split and limit."
        )
    results: dict[str, EvaluationResult] = {}
    parts: dict[str, Measurement] = {}
    for name in SETS:
        role = "forget" if name == "forget" else "retain"
        probability = "choice_probability" if name in WITH_CHOICES else "answer_probability"
        metrics: list[Any] = [probability, "rouge_l_recall", ("truth_ratio", {"definition": definition, "role": role})]
        result = evaluate(
            model,
            tokenizer,
            sets[name][:limit],
            [*metrics, *(extra_metrics if name == "forget" else ())],
            generation=generation,
            dataset=f"TOFU {name}",
            **options,
        )
        results[name] = result
        if name != "forget":
            parts |= {
                f"{name} {m.name.split('(')[0]}": m for m in measure(result.scored, metrics, resamples=0).measurements
            }
    measurements = [model_utility(parts), *(m for result in results.values() for m in result.measurements)]
    found = TofuResult(measurements, results)
    if retrained is not None:
        ratios = found.truth_ratios()
        kept = np.isfinite(ratios) & np.isfinite(retrained)
        found.measurements = [*forget_quality(ratios[kept], retrained[kept]), *measurements]
    return found
