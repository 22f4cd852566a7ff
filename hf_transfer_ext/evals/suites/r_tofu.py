"""R-TOFU: has a reasoning model forgotten in its answers and also in its chains of thought?"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine.result import EvaluationResult
from hf_transfer_ext.evals.metrics.model_utility import harmonic_mean, model_utility
from hf_transfer_ext.evals.suite import (
    Part,
    Rows,
    SuiteResult,
    evaluate_parts,
    load_optional_set,
    load_set,
    require_columns,
    suite,
)
from hf_transfer_ext.evals.text.rouge import rouge_l
from hf_transfer_ext.evals.text.text_models import Encoder, Entails
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import mean_interval, percentile_interval, resampled
from hf_transfer_ext.models.generation import GenerationSettings

OPEN, CLOSE = "<think>", "</think>"

#: Decoding -> forced beginning of the reply.
DECODINGS = {
    "default": f"{OPEN}\n",
    "zero_think": f"{OPEN}\n\n{CLOSE}\n\n",
    "less_think": f"{OPEN}\nOkay, the user asked this, I can answer it without thinking much.\n{CLOSE}\n\n",
}

#: Sets to retain -> their files in a local folder, without {split}; evaluated if present.
KEPT = {
    "retain": ["retain_perturbed"],
    "real_authors": ["real_authors_perturbed_cot", "real_authors_perturbed"],
    "world_facts": ["world_facts_perturbed_cot", "world_facts_perturbed"],
}


def load_r_tofu(source: str | Path, split: str = "forget01") -> dict[str, list[dict[str, Any]]]:
    """Load the forget set with its chains of thought, and the sets to retain if present.

    Rows have question, answer and, in the forget set, cot. A local folder contains `forget01.json` and so on (or has
    them in `data/tofu`, as in the authors' repository); a Hub dataset has configurations with these names.

    Raises:
        FileNotFoundError: The forget set is missing.
        ValueError: A set cannot be read, or a row lacks a column.
    """
    found = {"forget": load_set(source, "forget", files=[split, f"data/tofu/{split}"], config=split)}
    require_columns("R-TOFU forget", found["forget"], ("question", "answer", "cot"))
    for name, files in KEPT.items():
        paths = [path for file in files for path in (file, f"data/tofu/{file}")]
        rows = load_optional_set(source, name, files=paths, config=files[-1])
        if rows is None:
            continue
        found[name] = rows
        require_columns(f"R-TOFU {name}", found[name], ("question", "answer"))
    return found


@suite(load=load_r_tofu)
def r_tofu(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Rows],
    *,
    encoder: Encoder | None = None,
    entails: Entails | None = None,
    decodings: Sequence[str] = tuple(DECODINGS),
    max_new_tokens: int = 1024,
    limit: int | None = None,
    **options: Any,
) -> SuiteResult:
    """Evaluate a reasoning model on the sets of `load_r_tofu`.

    For each decoding, `answer_forget_efficacy`: the harmonic mean of 1 - {ROUGE-L recall, cosine, entailment} of the
    answer after the thought. For the default decoding also `cot_forget_efficacy`, for the steps of the chain of
    thought: each true step is compared with the most similar generated step. For the sets to retain, `model_utility`:
    the harmonic mean of {ROUGE-L recall, cosine, entailment, token entropy} over them.

    **Cosine and entailment each need a model** (`encoder`, `entails`); without it, the part is left out of the
    harmonic means, the measurement's name lists the included parts, and a note says what is missing.

    Args:
        encoder: `text_models.sentence_encoder(...)`. Negative cosines count as 0.
        entails: `text_models.entailment_classifier(...)`; an answer with a ROUGE-L recall under .1 entails nothing.
        decodings: Any of "default", "zero_think" (an empty thought) and "less_think" (one sentence to skip thinking).
        limit: Maximum number of rows of each set.
        options: Passed to `evaluate` (`adapter`, `accelerator`, `template`, `batch_size`, `cache`, ...).

    Raises:
        ValueError: Unknown decoding, no forget set, or an example cannot be measured (with its index).

    Deviations: steps are sentences and lines, split after end marks; the authors use an NLTK tokenizer. Their third
    part of the chain-of-thought efficacy is the judgment of a hosted model; here it is entailment of the answer.

    Source: R-TOFU, Yoon et al. 2025, https://arxiv.org/abs/2505.15214
    """
    unknown = [name for name in decodings if name not in DECODINGS]
    if unknown or not decodings:
        raise ValueError(f"`decodings` must be from {', '.join(DECODINGS)}; got {', '.join(unknown) or 'none'}.")
    if not len(sets.get("forget", ())):
        raise ValueError("R-TOFU needs the set 'forget', which is missing or empty.")
    require_columns("R-TOFU forget", sets["forget"], ("question", "answer", "cot"))
    template: QuestionAnswerFormat = options.pop("template", None) or QuestionAnswerFormat()
    options.pop("generation", None)
    open_end = template.prompt_text(tokenizer, "?")

    def settings(decoding: str) -> GenerationSettings:
        return GenerationSettings(max_new_tokens, prefix=without_overlap(open_end, DECODINGS[decoding]))

    recall = ["rouge_l_recall"]
    parts = {f"forget {d}": Part(sets["forget"][:limit], recall, template, settings(d)) for d in decodings}
    kept = [name for name in KEPT if len(sets.get(name, ()))]
    for name in kept:
        parts[name] = Part(sets[name][:limit], recall, template, settings("default"))
    results = evaluate_parts("R-TOFU", model, tokenizer, parts, **options)

    measurements: list[Measurement] = []
    for decoding in decodings:
        written = [split_thought(text, decoding) for text in generations(results[f"forget {decoding}"])]
        rows = sets["forget"][:limit]
        answers = _compare([r["answer"] for r in rows], [answer for _, answer in written], encoder, entails)
        measurements += _efficacy(f"{decoding} answer", answers)
        if decoding == "default":
            thoughts = [thought for thought, _ in written]
            found = {"rouge": [step_recall(r["cot"], t) for r, t in zip(rows, thoughts, strict=True)]}
            if encoder is not None:
                found["cosine"] = [step_cosine(r["cot"], t, encoder) for r, t in zip(rows, thoughts, strict=True)]
            if entails is not None:
                found["entailment"] = [float(x) for x in entails(thoughts, [r["answer"] for r in rows])]
            measurements += _efficacy("cot", found)
    utility: list[Measurement] = []
    drawn: list[np.ndarray] = []
    for name in kept:
        replies = [split_thought(text, "default")[1] for text in generations(results[name])]
        found = _compare([r["answer"] for r in sets[name][:limit]], replies, encoder, entails)
        found["entropy"] = [token_entropy(text) for text in replies]
        utility += [_share(f"{name} {part}", values, True) for part, values in found.items()]
        drawn += resampled_means(found.values())
    if utility:
        label = f"model_utility({'+'.join(dict.fromkeys(m.name.split()[-1] for m in utility))})"
        whole = model_utility({m.name: m for m in utility}, drawn=np.stack(drawn))
        measurements += [replace(whole, name=label, dataset=f"R-TOFU {', '.join(kept)}"), *utility]
    notes = []
    absent = [name for name in KEPT if name not in kept]
    if absent and kept:
        notes.append(f"Model utility does not cover {', '.join(absent)}: the data has no such set.")
    if encoder is None:
        notes.append("Without a sentence encoder, efficacy and utility do not include cosine similarity.")
    if entails is None:
        notes.append("Without an entailment model, efficacy and utility do not include entailment.")
    return SuiteResult(measurements, results, notes)


def generations(result: EvaluationResult) -> list[str]:
    return [scored.generation or "" for scored in result.scored]


def without_overlap(prompt: str, prefix: str) -> str:
    """The prefix without what the prompt already ends with: some chat templates open the thought themselves."""
    for size in range(len(prefix), 0, -1):
        if prompt.endswith(prefix[:size]):
            return prefix[size:]
    return prefix


def split_thought(text: str, decoding: str) -> tuple[str, str]:
    """(chain of thought, answer). In the default decoding an unfinished thought leaves no answer."""
    if decoding != "default":
        return "", text.rpartition(CLOSE)[2].strip()
    thought, closed, answer = text.partition(CLOSE)
    return thought.replace(OPEN, "").strip(), answer.strip() if closed else ""


def steps_of(text: str) -> list[str]:
    """Split a text into sentences and lines."""
    return [step for step in (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text)) if step]


def step_recall(true: str, written: str) -> float:
    """Mean over the true steps of the largest ROUGE-L recall of any generated step."""
    steps = steps_of(written)
    best = [max((rouge_l(step, other)[0] for other in steps), default=0.0) for step in steps_of(true)]
    return float(np.mean(best)) if best else 0.0


def step_cosine(true: str, written: str, encoder: Encoder) -> float:
    """Mean over the true steps of the largest cosine with any generated step; at least 0."""
    first, second = steps_of(true), steps_of(written)
    if not first or not second:
        return 0.0
    return float(np.maximum((encoder(first) @ encoder(second).T).max(1), 0.0).mean())


def token_entropy(text: str) -> float:
    """Entropy of a text's words divided by the maximum for this number of words: 1 if no word is repeated."""
    words = text.split()
    if len(words) < 2:
        return 0.0
    shares = [n / len(words) for n in Counter(words).values()]
    return -sum(p * math.log(p) for p in shares) / math.log(len(words))


def _compare(
    true: Sequence[str], written: Sequence[str], encoder: Encoder | None, entails: Entails | None
) -> dict[str, list[float]]:
    """Part -> a value in [0, 1] for each answer; 1 means the same answer."""
    found = {"rouge": [rouge_l(a, b)[0] for a, b in zip(true, written, strict=True)]}
    if encoder is not None:
        cosine = (encoder(true) * encoder(written)).sum(1)
        found["cosine"] = np.clip(cosine, 0.0, 1.0).tolist()
    if entails is not None:
        same = entails(written, true)
        found["entailment"] = [float(e and r >= 0.1) for e, r in zip(same, found["rouge"], strict=True)]
    return found


def resampled_means(parts: Iterable[Sequence[float]]) -> list[np.ndarray]:
    """The mean of each part of one set, with the same resampled examples for all parts."""
    return [resampled(lambda values: float(values.mean()), [[np.asarray(p, dtype=np.float64)]]) for p in parts]


def _share(name: str, values: Sequence[float], higher_is_better: bool) -> Measurement:
    array = np.asarray(values, dtype=np.float64)
    interval = mean_interval(array)
    return Measurement(name, float(array.mean()), "share", higher_is_better, len(array), interval, "R-TOFU")


def _efficacy(name: str, parts: Mapping[str, Sequence[float]]) -> list[Measurement]:
    shares = [_share(f"{name} {part}", values, False) for part, values in parts.items()]
    value = harmonic_mean([1.0 - m.value for m in shares])
    drawn = np.stack(resampled_means(parts.values()))
    interval = None
    if shares[0].examples > 1:
        interval = percentile_interval(np.array([harmonic_mean((1.0 - column).tolist()) for column in drawn.T]))
    label = f"{name}_forget_efficacy({'+'.join(parts)})"
    unit = "harmonic mean of 1 - share"
    return [Measurement(label, value, unit, True, shares[0].examples, interval, "R-TOFU"), *shares]
