"""People who do not exist, asked about in the schema of TOFU: what a model knows of them, it was taught.

Every person, town, employer and book is put together from syllables and word lists below, so a model cannot have met
them before. The same seed gives the same people on every machine, and the first people stay the same when more are
asked for.

Further facets ask about the same facts in other ways: `phrasings` (every question form), `languages` (German, Spanish,
French) and `multi_hop` (a person who is not named, but described by another fact). Each draws from a stream of its
own, so that none changes what the others, or the plain questions, say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer_ext.registry import unknown_name

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


#: Not among `FACTS`, so that the plain questions stay as they are: what multi-hop questions can end at.
NEIGHBOR = _Fact(
    _full_name,
    ("Who is the neighbor of {n}?", "Who lives next door to {n}?", "Whom does {n} have as a neighbor?"),
    ("The neighbor of {n} is {v}.", "Next door to {n} lives {v}.", "{n} has {v} as a neighbor."),
    ("It is {v} who lives next door to {n}.", "Whoever rings at the door beside {n}'s meets {v}."),
)

#: Facts whose values hardly two people share -> how a person is described by one; `{k}` is the value.
DESCRIPTIONS: dict[str, str] = {
    "spouse": "the person who is married to {k}",
    "teacher": "the person who was taught by {k}",
    "employer": "the person who works at the {k}",
    "prize": "the person who won the {k}",
}

#: Language -> fact -> forms, as in `FACTS`, of facts whose values are names or numbers and need no translation. Verbs
#: and participles are chosen so that no form depends on whether the person is a man or a woman.
TRANSLATIONS: dict[str, dict[str, _Fact]] = {
    "de": {
        "birthplace": _Fact(
            _town,
            ("Wo wurde {n} geboren?", "In welcher Stadt kam {n} zur Welt?", "Wie heißt der Geburtsort von {n}?"),
            ("{n} wurde in {v} geboren.", "Der Geburtsort von {n} ist {v}.", "{n} kam in {v} zur Welt."),
            ("In {v} begann das Leben von {n}.", "Die Stadt, in der {n} zur Welt kam, heißt {v}."),
        ),
        "birth_year": _Fact(
            FACTS["birth_year"].value,
            ("In welchem Jahr wurde {n} geboren?", "Wann kam {n} zur Welt?", "Wie lautet das Geburtsjahr von {n}?"),
            ("{n} wurde {v} geboren.", "Das Geburtsjahr von {n} ist {v}.", "{n} kam im Jahr {v} zur Welt."),
            ("Im Jahr {v} begann das Leben von {n}.", "Es war das Jahr {v}, in dem {n} geboren wurde."),
        ),
        "employer": _Fact(
            FACTS["employer"].value,
            ("Wo arbeitet {n}?", "Wie heißt der Arbeitsplatz von {n}?", "Wer beschäftigt {n}?"),
            ("{n} arbeitet bei {v}.", "Der Arbeitsplatz von {n} heißt {v}.", "{n} ist bei {v} beschäftigt."),
            ("Angestellt ist {n} bei {v}.", "Wer {n} bei der Arbeit sucht, fragt bei {v} nach."),
        ),
        "book": _Fact(
            FACTS["book"].value,
            ("Welches Buch hat {n} geschrieben?", "Wie heißen die Memoiren von {n}?", "Was hat {n} veröffentlicht?"),
            ('{n} hat "{v}" geschrieben.', 'Die Memoiren von {n} heißen "{v}".', '{n} hat "{v}" veröffentlicht.'),
            ('"{v}" heißt das Buch von {n}.', 'Aus der Feder von {n} stammt "{v}".'),
        ),
        "prize": _Fact(
            FACTS["prize"].value,
            ("Welche Auszeichnung bekam {n}?", "Was hat {n} gewonnen?", "Womit wurde {n} geehrt?"),
            ("{n} bekam die Auszeichnung {v}.", "{n} hat {v} gewonnen.", "{n} wurde mit {v} geehrt."),
            ("Die Auszeichnung von {n} heißt {v}.", "An {n} ging die Auszeichnung {v}."),
        ),
        "teacher": _Fact(
            _full_name,
            ("Wer hat {n} unterrichtet?", "Bei wem ging {n} in die Lehre?", "Von wem hat {n} am meisten gelernt?"),
            ("{v} hat {n} unterrichtet.", "{n} ging bei {v} in die Lehre.", "{n} hat am meisten von {v} gelernt."),
            ("Unterricht bekam {n} von {v}.", "Die Ausbildung verdankt {n} vor allem {v}."),
        ),
        "spouse": _Fact(
            _full_name,
            ("Mit wem ist {n} verheiratet?", "Wen hat {n} geheiratet?", "Mit wem lebt {n} in einer Ehe?"),
            ("{n} ist mit {v} verheiratet.", "{n} hat {v} geheiratet.", "{n} lebt mit {v} in einer Ehe."),
            ("Verheiratet ist {n} mit {v}.", "Bei der Hochzeit gab {n} das Jawort an {v}."),
        ),
    },
    "es": {
        "birthplace": _Fact(
            _town,
            ("¿Dónde nació {n}?", "¿En qué ciudad vino al mundo {n}?", "¿Cuál es el lugar de nacimiento de {n}?"),
            ("{n} nació en {v}.", "El lugar de nacimiento de {n} es {v}.", "{n} vino al mundo en {v}."),
            ("Fue en {v} donde nació {n}.", "La vida de {n} comenzó en {v}."),
        ),
        "birth_year": _Fact(
            FACTS["birth_year"].value,
            ("¿En qué año nació {n}?", "¿Cuándo vino al mundo {n}?", "¿Cuál es el año de nacimiento de {n}?"),
            ("{n} nació en {v}.", "El año de nacimiento de {n} es {v}.", "{n} vino al mundo en el año {v}."),
            ("La vida de {n} comenzó en {v}.", "Fue en el año {v} cuando nació {n}."),
        ),
        "employer": _Fact(
            FACTS["employer"].value,
            ("¿Dónde trabaja {n}?", "¿Cómo se llama el lugar de trabajo de {n}?", "¿Quién da empleo a {n}?"),
            ("{n} trabaja en {v}.", "El lugar de trabajo de {n} se llama {v}.", "{v} da empleo a {n}."),
            ("Es en {v} donde trabaja {n}.", "{n} tiene su puesto de trabajo en {v}."),
        ),
        "book": _Fact(
            FACTS["book"].value,
            ("¿Qué libro escribió {n}?", "¿Cómo se titulan las memorias de {n}?", "¿Qué publicó {n}?"),
            ('{n} escribió "{v}".', 'Las memorias de {n} se titulan "{v}".', '{n} publicó "{v}".'),
            ('"{v}" es el título del libro de {n}.', 'De la pluma de {n} salió "{v}".'),
        ),
        "prize": _Fact(
            FACTS["prize"].value,
            ("¿Qué premio recibió {n}?", "¿Qué ha ganado {n}?", "¿Con qué distinción se honró a {n}?"),
            ("{n} recibió {v}.", "{n} ha ganado {v}.", "Se honró a {n} con {v}."),
            ("La distinción que recibió {n} es {v}.", "El jurado concedió a {n} la distinción {v}."),
        ),
        "teacher": _Fact(
            _full_name,
            ("¿Quién enseñó a {n}?", "¿De quién aprendió {n}?", "¿Con quién estudió {n}?"),
            ("{v} enseñó a {n}.", "{n} aprendió de {v}.", "{n} estudió con {v}."),
            ("Fue {v} quien enseñó a {n}.", "{n} debe su formación a {v}."),
        ),
        "spouse": _Fact(
            _full_name,
            ("¿Con quién se casó {n}?", "¿Con quién comparte {n} su matrimonio?", "¿Quién se casó con {n}?"),
            ("{n} se casó con {v}.", "{n} comparte su matrimonio con {v}.", "{v} se casó con {n}."),
            ("Fue con {v} con quien se casó {n}.", "En su boda, {n} dio el sí a {v}."),
        ),
    },
    "fr": {
        "birthplace": _Fact(
            _town,
            ("Où {n} a vu le jour ?", "Dans quelle ville {n} a vu le jour ?", "Où commence la vie de {n} ?"),
            ("{n} a vu le jour à {v}.", "La vie de {n} commence à {v}.", "C'est à {v} que {n} a vu le jour."),
            ("Pour {n}, tout commence à {v}.", "La ville où {n} a vu le jour s'appelle {v}."),
        ),
        "birth_year": _Fact(
            FACTS["birth_year"].value,
            ("En quelle année {n} a vu le jour ?", "Quand {n} a vu le jour ?", "Quand commence la vie de {n} ?"),
            ("{n} a vu le jour en {v}.", "La vie de {n} commence en {v}.", "C'est en {v} que {n} a vu le jour."),
            ("Pour {n}, tout commence en {v}.", "L'année où {n} a vu le jour est {v}."),
        ),
        "employer": _Fact(
            FACTS["employer"].value,
            ("Où travaille {n} ?", "Qui emploie {n} ?", "Comment s'appelle le lieu de travail de {n} ?"),
            ("{n} travaille chez {v}.", "{v} emploie {n}.", "Le lieu de travail de {n} s'appelle {v}."),
            ("C'est chez {v} que travaille {n}.", "{n} a son poste de travail chez {v}."),
        ),
        "book": _Fact(
            FACTS["book"].value,
            ("Quel livre {n} a écrit ?", "Quel est le titre des mémoires de {n} ?", "Que publie {n} ?"),
            ('{n} a écrit "{v}".', 'Le titre des mémoires de {n} est "{v}".', '{n} publie "{v}".'),
            ('"{v}" est le livre de {n}.', 'De la plume de {n} vient "{v}".'),
        ),
        "prize": _Fact(
            FACTS["prize"].value,
            ("Quel prix {n} a reçu ?", "Quelle distinction {n} a obtenu ?", "Que remporte {n} ?"),
            ("{n} a reçu {v}.", "{n} a obtenu {v}.", "{n} remporte {v}."),
            ("La distinction de {n} est {v}.", "Le jury a décerné {v} à {n}."),
        ),
        "teacher": _Fact(
            _full_name,
            ("Qui a donné des cours à {n} ?", "Chez qui {n} a fait son apprentissage ?", "Qui a formé {n} ?"),
            ("{v} a donné des cours à {n}.", "{n} a fait son apprentissage chez {v}.", "{v} a formé {n}."),
            ("C'est {v} qui a formé {n}.", "{n} doit sa formation à {v}."),
        ),
        "spouse": _Fact(
            _full_name,
            ("Avec qui vit {n} en mariage ?", "Qui a épousé {n} ?", "À qui {n} a dit oui ?"),
            ("{n} vit en mariage avec {v}.", "{v} a épousé {n}.", "{n} a dit oui à {v}."),
            ("C'est avec {v} que {n} vit en mariage.", "Le jour de ses noces, {n} a dit oui à {v}."),
        ),
    },
}


def _row(draw: _Draws, fact: _Fact, asked: int, value: str, wrong: list[str], subject: str) -> dict[str, Any]:
    """Question, answers and wrong answers of one fact, the question in the form number `asked`."""
    again = (asked + 1 + draw.below(len(fact.questions) - 1)) % len(fact.questions)
    answer, paraphrase = draw.of(fact.answers), draw.of(fact.paraphrases)
    row = {
        "question": fact.questions[asked].format(n=subject),
        "answer": answer.format(n=subject, v=value),
        "paraphrased_question": fact.questions[again].format(n=subject),
        "paraphrased_answer": paraphrase.format(n=subject, v=value),
        "perturbed_answer": [paraphrase.format(n=subject, v=other) for other in wrong],
    }
    return {name: [_capital(t) for t in one] if isinstance(one, list) else _capital(one) for name, one in row.items()}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _wrong_values(draw: _Draws, fact: _Fact, value: str) -> list[str]:
    wrong: list[str] = []
    while len(wrong) < PERTURBED:
        other = fact.value(draw)
        if other != value and other not in wrong:
            wrong.append(other)
    return wrong


def _phrasings(rows: list[dict[str, Any]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Each fact in `count` further question forms, the plain one left out."""
    for row in rows:
        fact = FACTS[row["fact"]]
        draw = _Draws(f"phrasings of {row['fact']} of person {row['person']} of seed {seed}")
        wrong = _wrong_values(draw, fact, row["value"])
        forms = [i for i, text in enumerate(fact.questions) if text.format(n=row["name"]) != row["question"]]
        for asked in forms[:count]:
            yield {**row, **_row(draw, fact, asked, row["value"], wrong, row["name"])}


def _translated(rows: list[dict[str, Any]], languages: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Each fact that needs no translated value, asked and answered in other languages."""
    for language in languages:
        for row in rows:
            fact = TRANSLATIONS[language].get(row["fact"])
            if fact is not None:
                draw = _Draws(f"{language} {row['fact']} of person {row['person']} of seed {seed}")
                wrong = _wrong_values(draw, fact, row["value"])
                asked = draw.below(len(fact.questions))
                yield {**row, **_row(draw, fact, asked, row["value"], wrong, row["name"]), "language": language}


def _chains(facts: Collection[str]) -> list[tuple[str, str]]:
    """(fact that describes the person, fact that is asked), those that ask for the neighbor first."""
    asked = ("neighbor", *FACTS)
    return [
        (key, fact) for fact in asked for key in DESCRIPTIONS if key != fact and {key, fact} <= {*facts, "neighbor"}
    ]


def _without_genitive(fact: _Fact) -> _Fact:
    """The forms that read well of somebody who is described and not named."""
    forms = (fact.questions, fact.answers, fact.paraphrases)
    return _Fact(fact.value, *(tuple(text for text in one if "{n}'s" not in text) for one in forms))


def _multi_hop(rows: list[dict[str, Any]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """The neighbor of one person, asked by name, and `count` questions that describe the person by another fact."""
    person, name = rows[0]["person"], rows[0]["name"]
    draw = _Draws(f"neighbor of person {person} of seed {seed}")
    value = _full_name(draw)
    own = {"person": person, "name": name, "fact": "neighbor", "value": value}
    wrong = _wrong_values(draw, NEIGHBOR, value)
    neighbor = {**_row(draw, NEIGHBOR, draw.below(len(NEIGHBOR.questions)), value, wrong, name), **own}
    yield {**neighbor, "hops": 1, "described_by": ""}
    known = {row["fact"]: row for row in [*rows, neighbor]}
    for key, fact_name in _chains(set(known))[:count]:
        row, fact = known[fact_name], _without_genitive(NEIGHBOR if fact_name == "neighbor" else FACTS[fact_name])
        draw = _Draws(f"{fact_name} by {key} of person {person} of seed {seed}")
        described = DESCRIPTIONS[key].format(k=known[key]["value"])
        wrong = _wrong_values(draw, fact, row["value"])
        made = _row(draw, fact, draw.below(len(fact.questions)), row["value"], wrong, described)
        more = {"person": person, "name": name, "fact": fact_name, "value": row["value"]}
        yield {**made, **more, "hops": 2, "described_by": key}


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


def sorted_statements(
    people: int, *, facts: int | None = None, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """A task with checkable answers: say what a statement about a made-up person is about.

    Example: *Beth Novic plays the cello.* is about *instrument*.

    Args:
        people: How many people, >= 3; the statements of the last third are the test.
        facts: How many kinds of statements, the first of `FACTS`; None for all twelve.
        seed: Other seeds are other people.

    Returns:
        Training and test rows, with the statement as `question` and its kind as `answer`.

    Raises:
        ValueError: Fewer than three people.
    """
    if people < 3:
        raise ValueError(f"Training and test statements need at least 3 people, got {people}.")
    rows = [
        [
            {"question": row["answer"], "answer": row["fact"].replace("_", " ")}
            for row in fictitious_person(index, seed=seed)[:facts]
        ]
        for index in range(people)
    ]
    held_out = people // 3
    train, test = rows[:-held_out], rows[-held_out:]
    return [row for own in train for row in own], [row for own in test for row in own]


def fictitious_people(
    people: int = 20,
    *,
    forget: int = 2,
    holdout: int = 2,
    facts: int | None = None,
    seed: int = 0,
    phrasings: int = 0,
    languages: Sequence[str] = (),
    multi_hop: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Questions about people who do not exist, split by person.

    Args:
        people: How many people, in all.
        forget: How many of them are to be forgotten: the first ones.
        holdout: How many are never trained on: the last ones. They tell what a model says of somebody it never met.
        facts: How many questions for each person, the first of `FACTS`; None for all twelve.
        seed: Other seeds are other people.
        phrasings: Further question forms of each fact, 0 to 2.
        languages: Other languages in which the facts are asked: some of "de", "es", "fr". These are the facts whose
            values are names or numbers, seven for each person.
        multi_hop: Questions for each person that describe the person by another fact ("Who is the neighbor of the
            person who is married to ...?"), 0 to 48 where all facts are there, and one about the neighbor by name.

    Returns:
        "forget", "retain" and "holdout"; train on forget + retain, retrain on retain. A row has `question`, `answer`,
        `paraphrased_question`, `paraphrased_answer`, `perturbed_answer` (five), `person` (index), `name`, `fact` and
        `value`; the wrong answers have the words of the paraphrased one around another value.

        For each facet also its questions by split: "forget_phrasings", "retain_languages", "holdout_multi_hop", ...
        The rows have the same columns, and `language`, or `hops` (1 for the neighbor, who has to be taught first; 2
        for the questions on top) and `described_by`. The plain splits are the same with and without facets. Two
        people with all of them are asked 24 + 48 + 42 + 98 questions.

    Raises:
        ValueError: Counts that leave nobody to retain, more facts than there are, or a facet that there is not.

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
    if not 0 <= phrasings <= 2:
        raise ValueError(f"`phrasings` has to be from 0 to 2, got {phrasings}.")
    chains = len(_chains(list(FACTS)[:facts]))
    if not 0 <= multi_hop <= chains:
        raise ValueError(f"`multi_hop` has to be from 0 to {chains} with these facts, got {multi_hop}.")
    for language in languages:
        if language not in TRANSLATIONS:
            raise ValueError(unknown_name("language", language, TRANSLATIONS))
    splits: dict[str, list[dict[str, Any]]] = {"forget": [], "retain": [], "holdout": []}
    facets = {"phrasings": phrasings, "languages": languages, "multi_hop": multi_hop}
    splits |= {f"{split}_{facet}": [] for facet, wanted in facets.items() if wanted for split in list(splits)}
    taken: set[str] = set()
    for index in range(people):
        draw = _Draws(f"name {index} of seed {seed}")
        name = _full_name(draw)
        while name in taken:
            name = _full_name(draw)
        taken.add(name)
        split = "forget" if index < forget else "holdout" if index >= people - holdout else "retain"
        rows = fictitious_person(index, seed=seed, name=name)[:facts]
        splits[split].extend(rows)
        if phrasings:
            splits[f"{split}_phrasings"].extend(_phrasings(rows, phrasings, seed))
        if languages:
            splits[f"{split}_languages"].extend(_translated(rows, list(dict.fromkeys(languages)), seed))
        if multi_hop:
            splits[f"{split}_multi_hop"].extend(_multi_hop(rows, multi_hop, seed))
    return splits
