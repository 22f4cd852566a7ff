"""RESTOR: does unlearning false facts restore the knowledge that they replaced?"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.evals.suite import Part, Rows, SuiteResult, evaluate_parts, load_json, require_columns, suite
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
    """Load facts, each with options: RESTOR's, or those of questions with wrong answers.

    A local file (JSON, JSON lines, parquet) holds rows in the TOFU schema, of which `corrupted_facts` makes the set
    "questions". A folder, or a data set on the Hub, is about RESTOR's target entities and gives the set "facts".

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
    if Path(source).is_file():
        return {"questions": corrupted_facts(load_rows(source), distractors=distractors, seed=seed)[0]}
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


def corrupted_facts(
    rows: Rows, *, distractors: int = 3, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Facts with options for `restor`, and rows that state a false answer to each: what a model is corrupted with.

    The false answer is one of the wrong ones of the same form (`perturbed_answer`), and the correct option then is the
    `paraphrased_answer`, which has that form. A row without wrong answers gets the answer of another row: of one with
    the same `fact` about somebody else, if there is one.

    Args:
        rows: Questions and answers in the TOFU schema.
        distractors: Number of random options per fact, at most.
        seed: Seed of the choice; the same rows and seed give the same facts.

    Returns:
        (facts, false rows), in the order of `rows`.

    Raises:
        ValueError: A row has no question or answer, or there is no false answer for it.
    """
    require_columns("RESTOR", rows, ["question", "answer"])
    facts, false_rows = [], []
    for index, row in enumerate(rows):
        draw = random.Random(f"{seed} {index}")
        own = row.get("perturbed_answer") or ()
        wrong = [own] if isinstance(own, str) else list(own)
        correct = str((wrong and row.get("paraphrased_answer")) or row["answer"])
        if not wrong:
            others = [other for other in rows if other["answer"] != row["answer"]]
            alike = [other for other in others if row.get("fact") is not None and other.get("fact") == row["fact"]]
            wrong = sorted({str(other["answer"]) for other in alike or others})
        if not wrong:
            raise ValueError(
                f"RESTOR: example {index} has no wrong answer (`perturbed_answer`), and no other row has another one."
            )
        draw.shuffle(wrong)
        false, rest = wrong[0], wrong[1 : 1 + distractors]
        options = {"correct": [correct], "corrupted": [false], "random": rest}
        facts.append({"fact": str(index), "question": str(row["question"]), **options})
        false_rows.append({"question": str(row["question"]), "answer": false})
    return facts, false_rows


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
    return _recovered("recovery", "gap of correct to wrong", gaps)


def correct_recovery(before: RestorResult, corrupted: RestorResult, unlearned: RestorResult) -> Measurement:
    r"""Like `recovery`, with `g` the mean over facts of log p(correct) alone.

    Unlearning that only makes the false answer unlikely raises `recovery`, and leaves this one at 0. False answers of
    the same form as the correct ones teach this form, too: if the correct answer is no less likely after corruption,
    there is no such share, and `recovery`, in which the form cancels, is the one to read.

    Raises:
        ValueError: As in `recovery`.

    Source: this package's own definition, for the stages of RESTOR, https://arxiv.org/abs/2411.00204
    """
    stages = [before, corrupted, unlearned]
    facts = sorted(set.intersection(*(set(stage.facts["correct"]) for stage in stages)))
    if not facts:
        raise ValueError("The three stages have no fact in common.")
    scores = [np.array([stage.facts["correct"][fact] for fact in facts]) for stage in stages]
    return _recovered("recovery of the correct answer", "log-probability of the correct options", scores)


def _recovered(name: str, what: str, stages: Sequence[np.ndarray]) -> Measurement:
    """(unlearned - corrupted) / (before - corrupted) of means over facts, with an interval over facts."""
    lost = float(stages[0].mean() - stages[1].mean())
    if lost <= 0:
        raise ValueError(
            f"Corruption moved the {what} from {stages[0].mean():.4g} to {stages[1].mean():.4g} nats "
            "per token, which is not a loss: there is nothing to recover. Corrupt longer, or check the model order."
        )

    def share(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> float:
        loss = float(first.mean() - second.mean())
        return float(third.mean() - second.mean()) / loss if loss > 0 else float("nan")

    interval = interval_of(share, [list(stages)])
    bounded = interval if interval is None or np.isfinite(interval).all() else None
    unit = "share of the loss through corruption"
    return Measurement(name, share(*stages), unit, True, len(stages[0]), bounded, "RESTOR facts")


def restor_sequence(results: Mapping[str, RestorResult]) -> list[Measurement]:
    """What was recovered: of results of the original, the corrupted and one or more unlearned models, in this order.

    Raises:
        ValueError: As in `recovery`.
    """
    if len(results) < 3:
        return []
    before, corrupted, *unlearned = results.values()
    found = []
    for name, result in zip(list(results)[2:], unlearned, strict=True):
        own = [recovery(before, corrupted, result)]
        try:
            own.append(correct_recovery(before, corrupted, result))
        except ValueError as error:
            result.notes.append(str(error))
        found += own if len(unlearned) == 1 else [replace(m, name=f"{name} {m.name}") for m in own]
    return found


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
    corrupted ones. Compare three stages with `recovery`: `evaluate --suite restor` does so with three models, and the
    unlearning recipe makes the corrupted one and measures all stages (`corrupt_epochs`).

    When to use it: the forget set is false, or otherwise harmful, and unlearning is to bring back what the model knew
    without it, not merely to make it silent.

    Args:
        sets: "facts", whose questions follow answered ones of other entities; or "questions" in the `template`.
        before: Result of the model before corruption, to compare each fact with.
        limit: Maximum number of facts.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `batch_size`, `cache`, ...).

    Raises:
        ValueError: There are no facts, a fact has no correct option, or an option has no tokens (with its index).

    Source: RESTOR, Rezaei et al. 2024, https://arxiv.org/abs/2411.00204
    """
    few_shot = bool(sets.get("facts"))
    facts = list(sets["facts"] if few_shot else sets.get("questions", ()))[:limit]
    if not facts:
        raise ValueError("RESTOR needs the set 'facts' (or 'questions'), which is missing or empty.")
    for index, fact in enumerate(facts):
        if not fact.get("question") or not fact.get("correct"):
            raise ValueError(f"RESTOR facts: example {index} needs a question and at least one correct option.")
    template = options.pop("template", None)
    options.pop("generation", None)
    rows = [
        {"question": fact["question"], "answer": option, "fact": fact["fact"], "category": category}
        for fact in facts
        for category in CATEGORIES
        for option in fact.get(category) or ()
    ]
    results = evaluate_parts(
        "RESTOR",
        model,
        tokenizer,
        {"options": Part(rows, ["nats_per_token"], TEMPLATE if few_shot else template)},
        **options,
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
