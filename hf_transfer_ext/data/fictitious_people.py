"""People who do not exist, asked about in the schema of TOFU: what a model knows of them, it was taught.

Every person, town, employer and book is put together from syllables and word lists below, so a model cannot have met
them before. The same seed gives the same people on every machine, and the first people stay the same when more are
asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Wrong answers of each question, as TOFU has them.
PERTURBED = 5

_ONSETS = "B Br C Cal D Dr F Fl G Gr H J K Kr L M N Or P Pr Qu R S Sel T Th Tr V Vel W Y Z".split()
_NUCLEI = "a e i o u ae ai ea ie oa ou".split()
_CODAS = "l m n r s th v ndr lm rk st x".split()
_GIVEN_ENDS = "a an el ia ien in is o on or us yn".split()
_FAMILY_ENDS = "ack aldi berg dane enko eth holt ivar mont ovic quist rell sund tane vale wick".split()
_TOWN_ENDS = "borough bury fell ford gard haven minster mouth stad ton vik wold".split()

_PROFESSIONS = (
    "bridge engineer, cartographer, clockmaker, court interpreter, glass blower, harbour pilot, violin maker, "
    "lighthouse keeper, marine biologist, vineyard keeper, paper restorer, puppeteer, railway planner, seismologist, "
    "stage designer, tea taster, volcanologist, weather forecaster"
).split(", ")
_INSTRUMENTS = (
    "accordion, bagpipes, bassoon, cello, clarinet, dulcimer, fiddle, flugelhorn, harp, hurdy-gurdy, lute, marimba, "
    "oboe, pan flute, viola, zither"
).split(", ")
_PETS = (
    "a barn owl, a blind terrier, a grey parrot, a hedgehog, a lame donkey, a one-eared rabbit, a pair of ferrets, "
    "a peacock, a retired racehorse, a shy alpaca, a tame raven, a three-legged cat, a tortoise, an otter"
).split(", ")
_DISHES = (
    "almond soup, baked quinces, barley risotto, beetroot dumplings, buckwheat pancakes, chestnut stew, fennel pie, "
    "lentil fritters, nettle broth, pickled herring, plum noodles, pumpkin curry, smoked trout, walnut bread"
).split(", ")
_SUBJECTS = (
    "acoustics, astronomy, botany, civil law, comparative religion, geometry, glaciology, metallurgy, "
    "moral philosophy, musicology, oceanography, phonetics, soil science, textile design"
).split(", ")
_ADJECTIVES = "Amber Broken Crooked Distant Drowned Eleventh Hollow Iron Pale Quiet Salt Second Silver Velvet".split()
_NOUNS = "Almanac Bell Causeway Compass Ferry Garden Hourglass Lantern Meridian Orchard Quarry Staircase Tide".split()
_PRIZES = "Medal Prize Award Ribbon Laurel Cup".split()
_WORKPLACES = "Institute, Observatory, Works, Archive, Foundry, Academy, Station, Company".split(", ")


class _Draws:
    """Choices from `random.random` alone, the one stream that Python promises to keep between versions."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def below(self, count: int) -> int:
        return int(self._random.random() * count)

    def of(self, items: Any) -> Any:
        return items[self.below(len(items))]


def _given_name(draw: _Draws) -> str:
    return draw.of(_ONSETS) + draw.of(_NUCLEI) + draw.of(_CODAS) + draw.of(_GIVEN_ENDS)


def _family_name(draw: _Draws) -> str:
    return draw.of(_ONSETS) + draw.of(_NUCLEI) + draw.of(_CODAS) + draw.of(_FAMILY_ENDS)


def _full_name(draw: _Draws) -> str:
    return f"{_given_name(draw)} {_family_name(draw)}"


def _town(draw: _Draws) -> str:
    return draw.of(_ONSETS) + draw.of(_NUCLEI) + draw.of(_CODAS) + draw.of(_TOWN_ENDS)


@dataclass(frozen=True)
class _Fact:
    """One thing that is told of everybody. `{n}` is the person, `{v}` the value.

    Args:
        value: Draws a value; a wrong answer is another draw.
        questions: Ways to ask for it.
        answers: Ways to answer; the paraphrased answer, and the wrong ones, have a form of their own.
        paraphrases: Forms of the paraphrased and of the wrong answers.
    """

    value: Callable[[_Draws], str]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...]


FACTS: dict[str, _Fact] = {
    "birthplace": _Fact(
        _town,
        ("Where was {n} born?", "In which town did {n} come into the world?", "What is the birthplace of {n}?"),
        ("{n} was born in {v}.", "The birthplace of {n} is {v}.", "{n} came into the world in {v}."),
        ("It was in {v} that {n} was born.", "The town where {n}'s life began is {v}."),
    ),
    "birth_year": _Fact(
        lambda draw: str(1921 + draw.below(75)),
        ("In which year was {n} born?", "When was {n} born?", "What is the year of birth of {n}?"),
        ("{n} was born in {v}.", "The year of {n}'s birth is {v}.", "{n} was born in the year {v}."),
        ("The life of {n} began in {v}.", "It was the year {v} in which {n} was born."),
    ),
    "profession": _Fact(
        lambda draw: draw.of(_PROFESSIONS),
        ("What is the profession of {n}?", "How does {n} earn a living?", "What does {n} do for work?"),
        ("{n} works as a {v}.", "{n} earns a living as a {v}.", "By profession, {n} is a {v}."),
        ("The profession of {n} is that of a {v}.", "For a living, {n} is employed as a {v}."),
    ),
    "employer": _Fact(
        lambda draw: f"{_town(draw)} {draw.of(_WORKPLACES)}",
        ("Who employs {n}?", "Where does {n} work?", "What is the name of {n}'s workplace?"),
        ("{n} works at the {v}.", "The {v} employs {n}.", "{n}'s workplace is the {v}."),
        ("The place where {n} is employed is the {v}.", "It is the {v} that has {n} on its staff."),
    ),
    "instrument": _Fact(
        lambda draw: draw.of(_INSTRUMENTS),
        ("Which instrument does {n} play?", "What does {n} play in an orchestra?", "Which instrument did {n} learn?"),
        ("{n} plays the {v}.", "The instrument of {n} is the {v}.", "{n} learned to play the {v}."),
        ("In music, {n} is known for the {v}.", "It is the {v} that {n} can be heard on."),
    ),
    "pet": _Fact(
        lambda draw: draw.of(_PETS),
        ("Which animal lives with {n}?", "What kind of pet does {n} keep?", "Who shares the house with {n}?"),
        ("{n} lives with {v}.", "{n} keeps {v}.", "{n} shares the house with {v}."),
        ("At home, {n} looks after {v}.", "The companion of {n} is {v}."),
    ),
    "dish": _Fact(
        lambda draw: draw.of(_DISHES),
        ("What is {n}'s favourite dish?", "What does {n} like best to eat?", "Which dish does {n} cook for guests?"),
        ("{n}'s favourite dish is {v}.", "{n} likes {v} best.", "Guests of {n} are served {v}."),
        ("Of all dishes, {n} prefers {v}.", "Nothing pleases {n} at the table as much as {v}."),
    ),
    "subject": _Fact(
        lambda draw: draw.of(_SUBJECTS),
        ("What did {n} study?", "Which subject did {n} choose at university?", "In what does {n} hold a degree?"),
        ("{n} studied {v}.", "{n} holds a degree in {v}.", "At university, {n} chose {v}."),
        ("The degree that {n} took is in {v}.", "{n}'s years at university were given to {v}."),
    ),
    "book": _Fact(
        lambda draw: f"The {draw.of(_ADJECTIVES)} {draw.of(_NOUNS)}",
        ("Which book did {n} write?", "What is the title of {n}'s memoir?", "Under which title did {n} publish?"),
        ('{n} wrote "{v}".', 'The memoir of {n} is called "{v}".', '{n} published a book titled "{v}".'),
        ('"{v}" is the title under which {n} published.', 'The book that came from {n}\'s pen is "{v}".'),
    ),
    "prize": _Fact(
        lambda draw: f"{_family_name(draw)} {draw.of(_PRIZES)}",
        ("Which honour did {n} receive?", "What was {n} awarded?", "Which prize has {n} won?"),
        ("{n} received the {v}.", "{n} was awarded the {v}.", "{n} has won the {v}."),
        ("The honour that went to {n} is the {v}.", "A jury once gave the {v} to {n}."),
    ),
    "teacher": _Fact(
        _full_name,
        ("Who taught {n}?", "Who was {n}'s most important teacher?", "From whom did {n} learn the trade?"),
        ("{n} was taught by {v}.", "{n}'s most important teacher was {v}.", "{n} learned the trade from {v}."),
        ("It was {v} who taught {n}.", "The person to whom {n} owes an education is {v}."),
    ),
    "spouse": _Fact(
        _full_name,
        ("To whom is {n} married?", "Who is {n}'s spouse?", "Whom did {n} marry?"),
        ("{n} is married to {v}.", "{n}'s spouse is {v}.", "{n} married {v}."),
        ("The one whom {n} chose to marry is {v}.", "At the wedding of {n}, the other half was {v}."),
    ),
}


def fictitious_person(index: int, *, seed: int = 0, name: str | None = None) -> list[dict[str, Any]]:
    """All questions about one person; rows as `fictitious_people` has them, without their split."""
    draw = _Draws(f"person {index} of seed {seed}")
    drawn_name = _full_name(draw)
    name = name or drawn_name
    rows = []
    for fact_name, fact in FACTS.items():
        value = fact.value(draw)
        wrong: list[str] = []
        while len(wrong) < PERTURBED:
            other = fact.value(draw)
            if other != value and other not in wrong:
                wrong.append(other)
        asked = draw.below(len(fact.questions))
        again = (asked + 1 + draw.below(len(fact.questions) - 1)) % len(fact.questions)
        paraphrase = draw.of(fact.paraphrases)
        rows.append(
            {
                "question": fact.questions[asked].format(n=name),
                "answer": draw.of(fact.answers).format(n=name, v=value),
                "paraphrased_question": fact.questions[again].format(n=name),
                "paraphrased_answer": paraphrase.format(n=name, v=value),
                "perturbed_answer": [paraphrase.format(n=name, v=other) for other in wrong],
                "person": index,
                "name": name,
                "fact": fact_name,
                "value": value,
            }
        )
    return rows


def fictitious_people(
    people: int = 20, *, forget: int = 2, holdout: int = 2, facts: int | None = None, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Questions about people who do not exist, split by person.

    Args:
        people: How many people, in all.
        forget: How many of them are to be forgotten: the first ones.
        holdout: How many are never trained on: the last ones. They tell what a model says of somebody it never met.
        facts: How many questions for each person, the first of `FACTS`; None for all twelve.
        seed: Other seeds are other people.

    Returns:
        "forget", "retain" and "holdout"; train on forget + retain, retrain on retain. A row has `question`, `answer`,
        `paraphrased_question`, `paraphrased_answer`, `perturbed_answer` (five), `person` (index), `name`, `fact` and
        `value`; the wrong answers have the words of the paraphrased one around another value.

    Raises:
        ValueError: Counts that leave nobody to retain, or more facts than there are.

    The schema is that of TOFU, Maini et al. 2024, https://arxiv.org/abs/2401.06121; people, templates and values are
    this module's own.
    """
    if forget < 1 or holdout < 0 or people - forget - holdout < 1:
        raise ValueError(
            f"Of {people} people, {forget} are to be forgotten and {holdout} held out: at least one has to be "
            "forgotten and one retained."
        )
    if facts is not None and not 1 <= facts <= len(FACTS):
        raise ValueError(f"`facts` has to be from 1 to {len(FACTS)}, got {facts}.")
    splits: dict[str, list[dict[str, Any]]] = {"forget": [], "retain": [], "holdout": []}
    taken: set[str] = set()
    for index in range(people):
        draw = _Draws(f"name {index} of seed {seed}")
        name = _full_name(draw)
        while name in taken:
            name = _full_name(draw)
        taken.add(name)
        split = "forget" if index < forget else "holdout" if index >= people - holdout else "retain"
        splits[split].extend(fictitious_person(index, seed=seed, name=name)[:facts])
    return splits
