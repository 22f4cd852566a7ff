"""Compare the models without any attack: what each still answers on the forget set and on the data to retain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.forget_retain import forget_retain
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.generation import GenerationSettings


@dataclass
class Answers:
    """Measurements, truth ratios and generations of each model, by model name.

    Args:
        measurements: The measurements of `forget_retain`.
        truth_ratios: Truth ratio of each forget example, if all of them have wrong answers.
        generations: The answer to each forget question; empty for rows of plain text.
    """

    measurements: dict[str, list[Measurement]] = field(default_factory=dict)
    truth_ratios: dict[str, list[float]] = field(default_factory=dict)
    generations: dict[str, list[str]] = field(default_factory=dict)


def answers_of(subjects: Mapping[str, Subject], data: AuditData) -> Answers:
    """Evaluate every model on the forget and retain sets, and generate its answers to the forget questions."""
    retain = [{key: value for key, value in row.items() if key != "perturbed_answer"} for row in data.retain]
    splits = {"forget": data.forget, "retain": retain}  # wrong answers are further passes: for the forget set only
    found = Answers()
    for name, s in subjects.items():
        shared = {"template": s.template, "accelerator": s.accelerator, "batch_size": s.batch_size}
        found.measurements[name] = forget_retain(s.model, s.tokenizer, splits, **shared)
        if not data.has_questions():
            continue
        wrong = all(row.get("perturbed_answer") for row in data.forget)
        result = evaluate(
            s.model, s.tokenizer, data.forget, ["rouge_l_recall", *(["truth_ratio"] if wrong else [])], resamples=0,
            generation=GenerationSettings(s.max_new_tokens), **shared,
        )  # fmt: skip
        found.generations[name] = [scored.generation or "" for scored in result.scored]
        if wrong:
            ratios = next(values for metric, values in result.values.items() if metric.startswith("truth_ratio"))
            found.truth_ratios[name] = ratios.tolist()
    return found
