"""RESTOR: does unlearning false facts restore the knowledge that they replaced?"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.suite import Part, Rows, SuiteResult, evaluate_parts, load_json, suite
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import interval_of, mean_interval

CATEGORIES = ("correct", "corrupted", "random")
TEMPLATE = QuestionAnswerFormat(template="plain", prompt="{question}", separator=" ", end_of_sequence=False)


@dataclass
class RestorResult(SuiteResult):
    """The result of one stage of a model on RESTOR.

    Args:
        facts: Category -> fact -> mean log-probability of its options, in nats per token.
    """

    facts: dict[str, dict[str, float]] = field(default_factory=dict)


def load_restor(
    source: str | Path, *, corruption: str = "mix_a0", shots: int = 5, distractors: int = 3, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Load the facts about RESTOR's target entities, each with options, from a local folder or the Hub.

    The folder contains `facts.json` (`dset`: entity -> property -> question and answers; `context`: property ->
    answered questions about others), `entities.json` and the corruption texts (`mix_a0.json`, ...). Options come from
    `options.json` (entity -> property -> correct, corrupted and random options) if it exists. The published data has
    none, so they are generated: *corrupted* options are wrong values of the same property in the texts about the
    entity, *random* ones are other values of the property. A fact that was not corrupted has no corrupted options.

    Args:
        corruption: Name of the file with the texts that the model was corrupted with.
        shots: Few-shot examples about other entities before each question.
        distractors: Number of random options per fact.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file does not have this format.
    """
    facts = load_json(source, "the facts", files=["facts", "datasets/facts"])
    if not isinstance(facts, Mapping) or not {"dset", "context"} <= set(facts):
        raise ValueError("RESTOR's facts.json needs the keys 'dset' and 'context'.")
    entities = load_json(source, "the entities", files=["entities", "datasets/entities"])
    unknown = [name for name in entities if name not in facts["dset"]]
    if unknown:
        raise ValueError(f"RESTOR: facts.json has nothing about {', '.join(map(repr, unknown[:5]))} of entities.json.")
    try:
        options = load_json(source, "the options", files=["options"])
    except FileNotFoundError:
        files = [corruption, f"datasets/wikidata/v0/{corruption}", f"datasets/wikidata/v4/{corruption}"]
        texts = [row["text"] for row in load_json(source, "the corruption texts", files=files)]
        options = make_options(facts, entities, texts, distractors=distractors, seed=seed)
    rows = []
    for entity in entities:
        for key, fact in facts["dset"][entity].items():
            offered = options.get(entity, {}).get(key)
            if offered is None:
                continue
            others = [row for row in facts["context"].get(key, ()) if row["entity"] != entity][:shots]
            shown = "".join(f"{row['question']} {row['answer']}\n" for row in others)
            rows.append({"fact": f"{entity}/{key}", "question": shown + fact["question"], **offered})
    return {"facts": rows}


def recovery(before: RestorResult, corrupted: RestorResult, unlearned: RestorResult) -> Measurement:
    r"""Share of the loss through corruption that unlearning recovered.

    .. math:: \frac{g_{unlearned} - g_{corrupted}}{g_{before} - g_{corrupted}}

    `g` is the mean over facts of log p(correct) - log p(corrupted). 1 is a full recovery, 0 is none, and a negative
    value means that unlearning did further harm. The interval draws facts again, the same ones at each stage; there is
    none where some draw lost nothing.

    Raises:
        ValueError: The stages have no fact in common, or corruption did not lower the gap, so nothing was lost.

    Source: this package's own definition, for the stages of RESTOR, https://arxiv.org/abs/2411.00204
    """
    stages = [before, corrupted, unlearned]
    facts = set.intersection(*(set(stage.facts[c]) for stage in stages for c in ("correct", "corrupted")))
    if not facts:
        raise ValueError("The three stages have no fact in common with a correct and a corrupted option.")
    gaps = [np.array([s.facts["correct"][f] - s.facts["corrupted"][f] for f in sorted(facts)]) for s in stages]
    lost = float(gaps[0].mean() - gaps[1].mean())
    if lost <= 0:
        raise ValueError(
            f"Corruption moved the gap of correct to wrong from {gaps[0].mean():.4g} to {gaps[1].mean():.4g} nats "
            "per token, which is not a loss: there is nothing to recover. Corrupt longer, or check the model order."
        )

    def share(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> float:
        loss = float(first.mean() - second.mean())
        return float(third.mean() - second.mean()) / loss if loss > 0 else float("nan")

    interval = interval_of(share, [gaps])
    bounded = interval if interval is None or np.isfinite(interval).all() else None
    return Measurement("recovery", share(*gaps), "share of the loss through corruption", True, len(facts), bounded)


def restor_sequence(results: Mapping[str, RestorResult]) -> list[Measurement]:
    """The recovery, if the results are those of the original, corrupted and unlearned model, in this order."""
    return [recovery(*results.values())] if len(results) == 3 else []


@suite(load=load_restor, compares_with="before", sequence=restor_sequence)
def restor(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Rows],
    *,
    before: RestorResult | None = None,
    limit: int | None = None,
    **options: Any,
) -> RestorResult:
    """Evaluate one stage of a model (before, corrupted, or unlearned) on the facts of `load_restor`.

    This is the logit-based evaluation: for each fact, the mean log-probability per token of its correct, corrupted and
    random options, averaged over options and then over facts, and how often the correct ones are more likely than the
    corrupted ones. Compare three stages with `recovery`.

    Args:
        before: Result of the model before corruption, to compare each fact with.
        limit: Maximum number of facts.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `batch_size`, `cache`, ...).

    Raises:
        ValueError: There are no facts, a fact has no correct option, or an option has no tokens (with its index).

    Source: RESTOR, Rezaei et al. 2024, https://arxiv.org/abs/2411.00204
    """
    facts = list(sets.get("facts", ()))[:limit]
    if not facts:
        raise ValueError("RESTOR needs the set 'facts', which is missing or empty.")
    for index, fact in enumerate(facts):
        if not fact.get("question") or not fact.get("correct"):
            raise ValueError(f"RESTOR facts: example {index} needs a question and at least one correct option.")
    for name in ("template", "generation"):
        options.pop(name, None)
    rows = [
        {"question": fact["question"], "answer": option, "fact": fact["fact"], "category": category}
        for fact in facts
        for category in CATEGORIES
        for option in fact.get(category) or ()
    ]
    results = evaluate_parts(
        "RESTOR", model, tokenizer, {"options": Part(rows, ["nats_per_token"], TEMPLATE)}, **options
    )
    losses = results["options"].values["nats_per_token"]
    scored: dict[str, dict[str, list[float]]] = {category: {} for category in CATEGORIES}
    for row, loss in zip(rows, losses, strict=True):
        if not np.isnan(loss):
            scored[row["category"]].setdefault(row["fact"], []).append(-loss)
    means = {c: {fact: float(np.mean(values)) for fact, values in own.items()} for c, own in scored.items()}
    measurements = [
        _mean(f"{category} log-probability", list(own.values()), "nats per token", category == "correct")
        for category, own in means.items()
        if own
    ]
    both = [fact for fact in means["correct"] if fact in means["corrupted"]]
    if both:
        wins = [float(means["correct"][fact] > means["corrupted"][fact]) for fact in both]
        measurements.insert(0, _mean("prefers correct to corrupted", wins, "share of facts", True))
    notes = [] if both else ["No fact has a corrupted option: the corruption texts have no other value of a property."]
    found = RestorResult(measurements, results, notes, facts=means)
    if before is not None:
        shared = [fact for fact in means["correct"] if fact in before.facts["correct"]]
        changes = [means["correct"][fact] - before.facts["correct"][fact] for fact in shared]
        found.measurements.append(_mean("correct log-probability change", changes, "nats per token", True))
    return found


def make_options(
    facts: Mapping[str, Any], entities: Sequence[str], texts: Sequence[str], *, distractors: int = 3, seed: int = 0
) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Entity -> property -> correct, corrupted and random options, from the facts and the corruption texts."""
    known: dict[str, set[str]] = {}
    for own in facts["dset"].values():
        for key, fact in own.items():
            known.setdefault(key, set()).update(fact["answers"])
    for key, rows in facts["context"].items():
        known.setdefault(key, set()).update(row["answer"] for row in rows)
    rng = random.Random(seed)
    made: dict[str, dict[str, dict[str, list[str]]]] = {}
    for entity in entities:
        about = "\n".join(text for text in texts if entity in text)
        made[entity] = {}
        for key, fact in facts["dset"][entity].items():
            right = {answer.lower() for answer in fact["answers"]}
            wrong = sorted(value for value in known[key] if value.lower() not in right)
            false = [value for value in wrong if value in about and re.search(rf"\b{re.escape(value)}\b", about)]
            rest = [value for value in wrong if value not in false]
            made[entity][key] = {
                "correct": list(fact["answers"]),
                "corrupted": false,
                "random": sorted(rng.sample(rest, min(distractors, len(rest)))),
            }
    return made


def _mean(name: str, values: Sequence[float], unit: str, higher_is_better: bool) -> Measurement:
    array = np.asarray(values, dtype=np.float64)
    interval = mean_interval(array)
    return Measurement(name, float(array.mean()), unit, higher_is_better, len(array), interval, "RESTOR facts")
