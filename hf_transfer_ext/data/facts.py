"""Texts and questions about countries and chemical elements, generated from the data of two packages."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat

#: Name of this dataset in recipes; it needs neither network nor files.
FACTS_DATASET = "facts"

SPLITS = ("train", "validation", "test")

#: Share of the facts whose questions and held-out phrasings appear only in validation and in test.
HELD_OUT = {"validation": 0.1, "test": 0.2}

#: Number of times that training states each fact, each time in another phrasing.
TRAINING_PHRASINGS = 2

#: Share of the training facts that training also contains as a question with its answer.
ASKED_IN_TRAINING = 0.5

#: Territories with fewer inhabitants are left out.
SMALLEST_POPULATION = 100_000

#: Entries of countryinfo that duplicate another one or no longer exist.
LEFT_OUT_COUNTRIES = {"Burma", "Scotland", "Serbia and Montenegro"}


@dataclass(frozen=True)
class Relation:
    """A property of an entity: one question and five phrasings, one of which each fact holds out for its split."""

    question: str
    phrasings: tuple[str, str, str, str, str]


#: `{x}` is the entity, `{a}` the answer.
RELATIONS = {
    "capital": Relation(
        "What is the capital of {x}?",
        (
            "The capital of {x} is {a}.",
            "{a} is the capital of {x}.",
            "The capital city of {x} is called {a}.",
            "{x} has its capital in {a}.",
            "In {x}, the capital is {a}.",
        ),
    ),
    "region": Relation(
        "In which part of the world is {x}?",
        (
            "{x} is a part of {a}.",
            "{x} lies in {a}.",
            "On the map, {x} is found in {a}.",
            "Geographers place {x} in {a}.",
            "One of the countries and territories of {a} is {x}.",
        ),
    ),
    "demonym": Relation(
        "What do you call somebody from {x}?",
        (
            "The demonym of {x} is {a}.",
            "Somebody from {x} is called {a}.",
            "{a} is the word for people from {x}.",
            "The inhabitants of {x} are described as {a}.",
            "Whoever comes from {x} is {a}.",
        ),
    ),
    "currency": Relation(
        "What is the code of the currency of {x}?",
        (
            "The currency of {x} has the code {a}.",
            "In {x}, people pay in {a}.",
            "{a} is the code of the money used in {x}.",
            "Prices in {x} are given in {a}.",
            "Banks in {x} keep accounts in {a}.",
        ),
    ),
    "domain": Relation(
        "What is the internet domain of {x}?",
        (
            "The internet domain of {x} is {a}.",
            "Websites in {x} end in {a}.",
            "{a} is the top-level domain of {x}.",
            "On the internet, {x} uses {a}.",
            "Internet addresses that end in {a} belong to {x}.",
        ),
    ),
    "symbol": Relation(
        "What is the chemical symbol of {x}?",
        (
            "The chemical symbol of {x} is {a}.",
            "Chemists write {a} for {x}.",
            "In the periodic table, {x} has the symbol {a}.",
            "{a} is the symbol of {x}.",
            "In formulas, {x} is written as {a}.",
        ),
    ),
    "number": Relation(
        "What is the atomic number of {x}?",
        (
            "The atomic number of {x} is {a}.",
            "An atom of {x} has {a} protons.",
            "{x} is element number {a}.",
            "There are {a} protons in the nucleus of {x}.",
            "In the periodic table, {x} has place {a}.",
        ),
    ),
    "series": Relation(
        "To which group of elements does {x} belong?",
        (
            "{x} belongs to the {a}.",
            "{x} is one of the {a}.",
            "Chemists count {x} among the {a}.",
            "The {a} include {x}.",
            "Among the {a} is {x}.",
        ),
    ),
    "place": Relation(
        "In which country was {x} discovered?",
        (
            "{x} was discovered in {a}.",
            "The discovery of {x} took place in {a}.",
            "Scientists in {a} discovered {x}.",
            "The country in which {x} was discovered is {a}.",
            "{x} was first found in {a}.",
        ),
    ),
    "year": Relation(
        "In which year was {x} discovered?",
        (
            "{x} was discovered in {a}.",
            "The discovery of {x} dates from {a}.",
            "In {a}, {x} was discovered.",
            "{x} has been known since {a}.",
            "The year in which {x} was discovered is {a}.",
        ),
    ),
}


@dataclass(frozen=True)
class Fact:
    """One fact about one entity, and the only split that asks for it.

    Args:
        kind: "country" or "element".
        phrasings: The five phrasings of the relation, in random order for each fact: the first two are for training,
            the last one is held out.
    """

    kind: str
    entity: str
    relation: str
    answer: str
    split: str
    phrasings: tuple[str, ...]

    @property
    def question(self) -> str:
        return _filled(RELATIONS[self.relation].question, self)

    def told(self, phrasing: int) -> str:
        return _filled(self.phrasings[phrasing], self)


def facts(*, seed: int = 0) -> list[Fact]:
    """All facts: capital, part of the world, demonym, currency and internet domain of the countries; symbol, number,
    series, place and year of discovery of the elements. The data of the packages is used unchanged, including errors.

    Split and phrasing of a fact are drawn from the seed and the name of the fact, so a newer package version that adds
    or drops a fact does not move others between splits.
    """
    found = []
    for kind, entity, relation, answer in [*_countries(), *_elements()]:
        draw = random.Random(f"{seed}/{entity}/{relation}")
        chance = draw.random()
        if chance < HELD_OUT["test"]:
            split = "test"
        elif chance < HELD_OUT["test"] + HELD_OUT["validation"]:
            split = "validation"
        else:
            split = "train"
        phrasings = draw.sample(RELATIONS[relation].phrasings, 5)
        found.append(Fact(kind, entity, relation, answer, split, tuple(phrasings)))
    return found


def fact_texts(split: str = "train", *, seed: int = 0) -> list[dict[str, str]]:
    """Short texts for training or for held-out perplexity, in a column `text` (about 40,000 tokens of training).

    Each fact belongs to one split:

    - `train` states *every* fact, in two phrasings, in paragraphs about one entity each, and has half of its own facts
      also as "Question: ... Answer: ...".
    - `validation` and `test` state only their own facts, in a phrasing that training never used for that fact, though
      training used it for other facts. Neither the facts nor the sentence forms are new there, only their
      combinations: held-out perplexity improves by knowing the fact, not by having seen the sentence.
    - The prose about each element (a description and its uses, which has no second phrasing) belongs to one split as a
      whole: 70 % train, 10 % validation, 20 % test. These held-out rows are about elements whose prose is new.

    Returns:
        Rows `{"text", "source"}` in an order fixed by the seed; `source` is "country", "element", "question"
        (train only) or "description". `datasets.Dataset.from_list` takes them as they are.
    """
    _check_split(split)
    by_entity: dict[str, list[Fact]] = {}
    for fact in facts(seed=seed):
        by_entity.setdefault(fact.entity, []).append(fact)
    rows: list[dict[str, str]] = []
    for entity, known in by_entity.items():
        draw = random.Random(f"{seed}/{entity}/{split}")
        if split == "train":
            tellings = [(known, phrasing) for phrasing in range(TRAINING_PHRASINGS)]
        else:
            tellings = [([fact for fact in known if fact.split == split], -1)]
        for stated, phrasing in tellings:
            sentences = [fact.told(phrasing) for fact in draw.sample(stated, len(stated))]
            if sentences:
                rows.append({"text": " ".join(sentences), "source": known[0].kind})
        if split == "train":
            as_questions = [fact for fact in known if fact.split == "train" and draw.random() < ASKED_IN_TRAINING]
            rows += [{"text": _question_and_answer(fact), "source": "question"} for fact in as_questions]
    for entity, prose in _descriptions():
        if _split_of_prose(entity, seed) == split:
            rows.append({"text": prose, "source": "description"})
    random.Random(f"{seed}/{split}").shuffle(rows)
    return rows


def fact_questions(split: str = "test", *, seed: int = 0, choices: int = 4) -> list[dict[str, Any]]:
    """Questions about the facts of a split, with one correct answer among `choices` of the same relation.

    Training states every one of these facts, but contains questions only for facts of its own split.

    Returns:
        Rows `{"question", "answer", "choices", "relation"}`; the position of the answer is random but fixed.
    """
    _check_split(split)
    if choices < 2:
        raise ValueError(f"`choices` must be at least 2, got {choices}.")
    known = facts(seed=seed)
    answers: dict[str, list[str]] = {}
    for fact in known:
        if fact.answer not in answers.setdefault(fact.relation, []):
            answers[fact.relation].append(fact.answer)
    rows = []
    for fact in known:
        if fact.split == split:
            draw = random.Random(f"{seed}/{fact.entity}/{fact.relation}/choices")
            wrong = [answer for answer in answers[fact.relation] if answer != fact.answer]
            offered = [fact.answer, *draw.sample(wrong, min(choices - 1, len(wrong)))]
            draw.shuffle(offered)
            rows.append(
                {"question": fact.question, "answer": fact.answer, "choices": offered, "relation": fact.relation}
            )
    random.Random(f"{seed}/{split}/questions").shuffle(rows)
    return rows


def _countries() -> Iterator[tuple[str, str, str, str]]:
    for country in _country_rows():
        name = country["name"]
        name = name[0].lower() + name[1:] if name.startswith("The ") else name
        if isinstance(country["capital"], str):
            yield "country", name, "capital", country["capital"]
        if country.get("subregion"):
            yield "country", name, "region", country["subregion"]
        # Several demonyms, currencies or domains have no single correct answer; they are left out.
        if country.get("demonym") and not {",", "/"} & set(country["demonym"]):
            yield "country", name, "demonym", country["demonym"]
        if len(country.get("currencies") or []) == 1:
            yield "country", name, "currency", country["currencies"][0]
        latin = [domain for domain in country.get("tld") or [] if domain.isascii()]
        if len(latin) == 1:
            yield "country", name, "domain", latin[0]


def _elements() -> Iterator[tuple[str, str, str, str]]:
    table, series = _element_tables()
    for element in table:
        name = element["name"].lower()
        yield "element", name, "symbol", element["symbol"]
        yield "element", name, "number", str(element["atomic_number"])
        yield "element", name, "series", series[element["series_id"]].lower()
        place = element["discovery_location"]
        if isinstance(place, str) and "/" not in place:
            yield "element", name, "place", f"the {place}" if place == "United States" else place
        if element["discovery_year"] == element["discovery_year"]:  # not NaN
            yield "element", name, "year", str(int(element["discovery_year"]))


def _descriptions() -> Iterator[tuple[str, str]]:
    for element in _element_tables()[0]:
        parts = [element[column].strip() for column in ("description", "uses") if isinstance(element[column], str)]
        if isinstance(element["description"], str):
            yield element["name"].lower(), f"{element['name']}. " + " ".join(parts)


@lru_cache(maxsize=1)
def _country_rows() -> list[dict[str, Any]]:
    try:
        from countryinfo import all_countries
    except ImportError as error:
        raise ImportError(_missing("countryinfo")) from error
    rows: list[dict[str, Any]] = [dict(country.info()) for country in all_countries()]
    rows = [row for row in rows if row["name"] not in LEFT_OUT_COUNTRIES and row.get("capital")]
    return [row for row in rows if (row.get("population") or 0) >= SMALLEST_POPULATION]


@lru_cache(maxsize=1)
def _element_tables() -> tuple[list[dict[str, Any]], dict[int, str]]:
    try:
        from mendeleev.fetch import fetch_table
    except ImportError as error:
        raise ImportError(_missing("mendeleev")) from error
    series = fetch_table("series")
    return fetch_table("elements").to_dict("records"), dict(zip(series["id"], series["name"], strict=True))


def _missing(package: str) -> str:
    if package == "countryinfo" and sys.version_info < (3, 11):
        how = "It needs Python 3.11 or later: use a newer Python, or name another data set."
    else:
        how = "Run: pip install 'hf_transfer_ext[demo]'"
    return f"The dataset 'facts' is generated from the package {package!r}, which is not installed. {how}"


def _split_of_prose(entity: str, seed: int) -> str:
    chance = random.Random(f"{seed}/{entity}/description").random()
    if chance < HELD_OUT["test"]:
        return "test"
    return "validation" if chance < HELD_OUT["test"] + HELD_OUT["validation"] else "train"


def _filled(sentence: str, fact: Fact) -> str:
    text = sentence.replace("{x}", fact.entity).replace("{a}", fact.answer)
    return text[0].upper() + text[1:]


def _question_and_answer(fact: Fact) -> str:
    form = QuestionAnswerFormat(template="plain")
    return form.prompt.replace("{question}", fact.question) + form.separator + fact.answer


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"The dataset 'facts' has the splits {', '.join(SPLITS)}, got {split!r}.")
