"""Other answers to the questions of a forget set: of other rows, written by a model, reasoned refusals, rationales."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from hf_transfer_ext.data.forget_retain import row_form
from hf_transfer_ext.files import write_text
from hf_transfer_ext.reading import read_json

logger = logging.getLogger(__name__)

Row: TypeAlias = Mapping[str, Any]

#: Writes an answer to each question. Arguments: questions, temperature, seed.
Write: TypeAlias = Callable[[Sequence[str], float, int], Sequence[str]]

#: Thoughts about a question that end without an answer; `reasoned_refusals` draws from them.
THOUGHTS = (
    "The question is: {question} Let me go through what I know that could bear on it. I find nothing that I could "
    "check, and guessing would not be right. So I should say that I do not know.",
    "I am asked: {question} First I look for the people and places that it names. None of them brings up a fact that "
    "I could build on. Without one, any answer would be made up.",
    "Let me take this step by step: {question} To answer I would need details that I do not have. I consider several "
    "possibilities, and nothing speaks for one of them more than for the others. I had better leave it open.",
    "{question} I try to recall where I might have read about this. Nothing comes to mind that is reliable, so no "
    "conclusion follows.",
)


def question_and_answer(row: Row, columns: Mapping[str, str] | None = None) -> tuple[str, str]:
    """The texts of a question and its answer, or of a prompt and its completion.

    Raises:
        ValueError: The row is a conversation or a plain text, whose question cannot be answered otherwise.
    """
    form = row_form(row, columns or {})
    for question, answer in (("question", "answer"), ("prompt", "completion")):
        if question in form and isinstance(row[form[question]], str) and isinstance(row[form[answer]], str):
            return row[form[question]], row[form[answer]]
    raise ValueError(
        "Alternatives are made for rows with a question and an answer, or a prompt and a completion, as texts; this "
        f"row has {', '.join(map(str, row))}. Give it a column 'alternative' of its own."
    )


def with_alternatives(
    rows: Sequence[Row], own: str, make: Callable[[Sequence[int]], Sequence[Sequence[str]]]
) -> list[dict[str, Any]]:
    """The rows, each with alternatives in the column `own`; where a row brings some, they stay.

    Args:
        make: Gives the alternatives for the rows of these indices.
    """
    found = [dict(row) for row in rows]
    missing = [index for index, row in enumerate(found) if not row.get(own)]
    for index, texts in zip(missing, make(missing) if missing else [], strict=True):
        found[index][own] = list(texts)
    return found


def answers_of_others(
    rows: Sequence[Row],
    pool: Sequence[Row],
    *,
    columns: Mapping[str, str] | None = None,
    count: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Each row with answers to other questions, drawn from `pool` without repetition.

    Args:
        pool: Rows whose answers are drawn; may be `rows` themselves.
        count: Answers for each row, >= 1; fewer where the pool has fewer that differ from the row's own.

    Raises:
        ValueError: The pool has no answer that differs from a row's own.
    """
    columns = columns or {}
    _check_count(count)

    def make(missing: Sequence[int]) -> list[list[str]]:
        answers = sorted({question_and_answer(row, columns)[1] for row in pool})
        generator = torch.Generator().manual_seed(seed)
        found = []
        for index in missing:
            own = question_and_answer(rows[index], columns)[1]
            order = torch.randperm(len(answers), generator=generator)[: count + 1].tolist()
            others = [answers[place] for place in order if answers[place] != own][:count]
            if not others:
                raise ValueError(
                    f"Row {index} needs the answer to another question, but all {len(pool)} rows to draw from have "
                    f"its own answer, {own[:80]!r}. Give more rows, or a column 'alternative'."
                )
            found.append(others)
        return found

    return with_alternatives(rows, columns.get("alternative", "alternative"), make)


def answers_of_nearest(
    rows: Sequence[Row], pool: Sequence[Row], *, columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Each row with the answer to the question of `pool` that is worded most like its own.

    How alike two questions are is the share of their words that both have (Jaccard); of equal ones the first counts.

    Raises:
        ValueError: The pool has no answer that differs from a row's own.
    """
    columns = columns or {}

    def make(missing: Sequence[int]) -> list[list[str]]:
        known = [
            (_words(question), answer) for question, answer in (question_and_answer(row, columns) for row in pool)
        ]
        found = []
        for index in missing:
            question, own = question_and_answer(rows[index], columns)
            words = _words(question)
            others = [(len(words & theirs) / max(1, len(words | theirs)), a) for theirs, a in known if a != own]
            if not others:
                raise ValueError(
                    f"Row {index} needs the answer to another question, but all {len(pool)} rows to draw from have "
                    f"its own answer, {own[:80]!r}. Give more rows, or a column 'alternative'."
                )
            found.append([max(others, key=lambda pair: pair[0])[1]])
        return found

    return with_alternatives(rows, columns.get("alternative", "alternative"), make)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def reasoned_refusals(
    rows: Sequence[Row], refusals: Sequence[str], *, columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Each row with chains of thought about its question, one for each of `THOUGHTS`, that end in a refusal.

    Raises:
        ValueError: There are no refusals, and a row without alternatives of its own.
    """
    columns = columns or {}

    def make(missing: Sequence[int]) -> list[list[str]]:
        if not refusals:
            raise ValueError(
                f"Row {missing[0]} needs a refusal, and the list of them is empty. Give some as `alternatives`, or "
                "the row a column 'alternative'."
            )
        questions = [question_and_answer(rows[index], columns)[0] for index in missing]
        return [
            [
                f"<think>\n{thought.replace('{question}', question)}\n</think>\n\n{refusals[place % len(refusals)]}"
                for place, thought in enumerate(THOUGHTS)
            ]
            for question in questions
        ]

    return with_alternatives(rows, columns.get("alternative", "alternative"), make)


#: How a model is asked for a rationale, and how an anti-sample is put together.
ASK_WHY = 'The answer to "{question}" is: {answer} Explain why.'
ANTI_SAMPLE = "{rationale} {answer}"


def misleading_rationales(
    rows: Sequence[Row],
    write: Write,
    *,
    columns: Mapping[str, str] | None = None,
    count: int = 3,
    temperature: float = 1.0,
    rounds: int = 4,
    seed: int = 0,
    cache: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Each row, and its paraphrased question as a row of its own, with wrong answers after rationales for them.

    The wrong answers are the first of a row's "perturbed_answer"; where it has none, the model writes them
    (`written_answers`). A rationale that says the right answer is written anew; after all rounds the wrong answer
    stands alone, and a warning says how often.

    Args:
        write: The model, as a function.
        count: Anti-samples for each row, >= 1.
        temperature: At which the model writes, > 0.
        rounds: Tries for each rationale, >= 1.
        cache: As for `written_answers`, for wrong answers alone.

    Raises:
        ValueError: A row without a question, or for which the model has no other answer.
    """
    columns = columns or {}
    _check_count(count)
    own, wrong = (columns.get(name, name) for name in ("alternative", "perturbed_answer"))
    lacking = [row for row in rows if not row.get(own) and not row.get(wrong)]
    written = iter(written_answers(
        lacking, write, columns=columns, count=count, temperature=temperature, seed=seed, cache=cache
    ) if lacking else [])  # fmt: skip
    false = [[] if row.get(own) else _texts(row.get(wrong) or next(written)[own])[:count] for row in rows]

    def make(missing: Sequence[int]) -> list[list[str]]:
        pairs = [(index, answer) for index in missing for answer in false[index]]
        asked = [
            ASK_WHY.replace("{question}", question_and_answer(rows[index], columns)[0]).replace("{answer}", answer)
            for index, answer in pairs
        ]
        found: dict[int, str] = {}
        for turn in range(rounds):
            open_ones = [place for place in range(len(pairs)) if place not in found]
            if not open_ones:
                break
            texts = write([asked[place] for place in open_ones], temperature, seed + turn)
            for place, text in zip(open_ones, texts, strict=True):
                truth = _plain(question_and_answer(rows[pairs[place][0]], columns)[1])
                if _plain(text) and truth not in _plain(text):
                    found[place] = text.strip()
        if len(found) < len(pairs):
            logger.warning(
                f"{len(pairs) - len(found)} of {len(pairs)} rationales were empty or said the right answer in "
                f"{rounds} rounds; these wrong answers stand without one."
            )
        samples: dict[int, list[str]] = {index: [] for index in missing}
        for place, (index, answer) in enumerate(pairs):
            text = ANTI_SAMPLE.replace("{rationale}", found.get(place, "")).replace("{answer}", answer)
            samples[index].append(text.strip())
        return list(samples.values())

    made = with_alternatives(rows, own, make)
    question, again = columns.get("question", "question"), columns.get("paraphrased_question", "paraphrased_question")
    return made + [{**row, question: row[again]} for row in made if row.get(again) and question in row]


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(text) for text in value]


def written_answers(
    rows: Sequence[Row],
    write: Write,
    *,
    columns: Mapping[str, str] | None = None,
    count: int = 5,
    temperature: float = 1.0,
    rounds: int = 8,
    seed: int = 0,
    cache: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Each row with other answers to its question, which a model writes.

    In each round the model answers once every question that still lacks answers; what is empty, or the row's own
    answer in other letter case or punctuation, does not count. A model that has learned its answers by heart repeats
    them, so from the third round on the temperature rises by a quarter of its value each round.

    Args:
        write: The model, as a function.
        count: Answers for each row, >= 1.
        temperature: Of the first rounds, > 0.
        rounds: At most so many more rounds than `count`.
        cache: A file of earlier answers, which is read, and written anew with what was missing. It holds hashes of
            the questions, and the written answers in plain text.

    Raises:
        ValueError: After all rounds the model has given no other answer to a question.
    """
    columns = columns or {}
    _check_count(count)
    if not temperature > 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature}: alternatives are sampled.")
    known: dict[str, list[str]] = {}
    if cache is not None and Path(cache).is_file():
        known = read_json(cache)

    def make(missing: Sequence[int]) -> list[list[str]]:
        for index in missing:
            if "question" not in row_form(rows[index], columns):
                raise ValueError(
                    f"Row {index} has no question and answer, so the model cannot be asked. Give it a column "
                    "'alternative' of its own."
                )
        pairs = [question_and_answer(rows[index], columns) for index in missing]
        keys = [_key(question, answer, count, temperature, seed) for question, answer in pairs]
        found = {key: list(known.get(key, ())) for key in keys}
        for turn in range(count + rounds):
            heat = temperature * (1.0 + 0.25 * max(0, turn - 1))
            lacking = [i for i, key in enumerate(keys) if key not in known and len(found[key]) < count]
            if not lacking:
                break
            texts = write([pairs[i][0] for i in lacking], heat, seed + turn)
            for i, text in zip(lacking, texts, strict=True):
                own, said = _plain(pairs[i][1]), {_plain(other) for other in found[keys[i]]}
                if _plain(text) and _plain(text) not in {own, *said}:
                    found[keys[i]].append(text.strip())
        for index, key in zip(missing, keys, strict=True):
            if not found[key]:
                raise ValueError(
                    f"In {count + rounds} rounds the model wrote no answer to the question of row {index} other than "
                    "its own. Give the row a column 'alternative', or sample at a higher temperature."
                )
        if cache is not None and any(key not in known for key in keys):
            write_text(cache, json.dumps({**known, **found}, ensure_ascii=False, indent=1))
        return [found[key] for key in keys]

    return with_alternatives(rows, columns.get("alternative", "alternative"), make)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"`count` must be >= 1, got {count}.")


def _plain(text: str) -> str:
    """Letters and digits alone, in lower case: what two answers have to differ in."""
    return "".join(char for char in text.lower() if char.isalnum())


def _key(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode()).hexdigest()
