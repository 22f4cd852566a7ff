"""What audited models do without any attack: the forget and retain sets measured on each, and what each one writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.engine.evaluate import GenerationSettings, evaluate
from hf_transfer_ext.evals.suites.forget_retain import forget_retain
from hf_transfer_ext.measurement import Measurement


@dataclass
class SideBySide:
    """Audited models beside each other, by name.

    Args:
        measured: Measurements of the forget and retain sets.
        truth_ratios: Truth ratio of each forget example, where all of them have wrong answers.
        generations: What the model writes when asked each forget question.
    """

    measured: dict[str, list[Measurement]] = field(default_factory=dict)
    truth_ratios: dict[str, list[float]] = field(default_factory=dict)
    generations: dict[str, list[str]] = field(default_factory=dict)


def side_by_side(subjects: Mapping[str, Subject], data: AuditData) -> SideBySide:
    """Measure every subject on the forget and retain sets, and let it answer the forget questions."""
    # Wrong answers are five passes more: they are scored on the forget set only.
    retain = [{key: value for key, value in row.items() if key != "perturbed_answer"} for row in data.retain]
    has_wrong = all(row.get("perturbed_answer") for row in data.forget)
    metrics = ["rouge_l_recall", *(["truth_ratio"] if has_wrong else [])]
    found = SideBySide()
    for name, one in subjects.items():
        looks: Any = {"template": one.template, "accelerator": one.accelerator, "batch_size": one.batch_size}
        found.measured[name] = forget_retain(
            one.model, one.tokenizer, {"forget": data.forget, "retain": retain}, **looks
        )
        generation = GenerationSettings(one.max_new_tokens)
        result = evaluate(one.model, one.tokenizer, data.forget, metrics, resamples=0, generation=generation, **looks)
        found.generations[name] = [str(scored.generation) for scored in result.scored]
        if has_wrong:
            values = next(v for metric, v in result.values.items() if metric.startswith("truth_ratio"))
            found.truth_ratios[name] = values.tolist()
    return found
