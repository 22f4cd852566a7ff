import sys
from collections import Counter

import pytest

from hf_transfer_ext.data import facts as module
from hf_transfer_ext.data.facts import RELATIONS, SPLITS, fact_questions, fact_texts, facts

NAMES = [
    a + b for a in ("Bel", "Cor", "Dan", "Fer", "Gal", "Hol", "Kel", "Lor") for b in ("avia", "onia", "istan", "ara")
]


@pytest.fixture
def small_world(monkeypatch):
    """32 invented countries and 30 invented elements in the columns of the two packages."""
    countries = [
        {
            "name": name,
            "capital": f"{name} City",
            "subregion": ("Northern Europe", "Western Asia", "Polynesia")[i % 3],
            "demonym": f"{name}n",
            "currencies": [f"{name[0]}{name[1].upper()}{chr(65 + i % 26)}"],
            "tld": [f".{name[:2].lower()}{i}"],
        }
        for i, name in enumerate(NAMES)
    ]
    elements = [
        {
            "name": f"{name}um",
            "symbol": f"{name[0]}{chr(97 + i % 26)}",
            "atomic_number": 200 + i,
            "series_id": i % 2,
            "discovery_location": "United States" if i % 2 else float("nan"),
            "discovery_year": 1700.0 + i if i % 3 else float("nan"),
            "description": f"Soft metal number {i}." if i % 4 else float("nan"),
            "uses": "Used in lamps.",
        }
        for i, name in enumerate(NAMES[:30])
    ]
    monkeypatch.setattr(module, "_country_rows", lambda: countries)
    monkeypatch.setattr(module, "_element_tables", lambda: (elements, {0: "Noble gases", 1: "Halogens"}))


def sentences(split, seed=0):
    return "\n".join(row["text"] for row in fact_texts(split, seed=seed))


def test_training_tells_every_fact_in_its_first_two_phrasings(small_world):
    train = sentences("train")
    for fact in facts():
        assert fact.told(0) in train and fact.told(1) in train
        assert fact.told(0) != fact.told(1)


def test_held_out_tellings_are_new_but_their_form_is_not(small_world):
    train = sentences("train")
    trained_forms = {phrasing for fact in facts() for phrasing in fact.phrasings[:2]}
    for split in ("validation", "test"):
        held_out = sentences(split)
        for fact in facts():
            assert (fact.told(-1) in held_out) == (fact.split == split)
            if fact.split == split:
                assert fact.told(-1) not in train
                assert fact.phrasings[-1] in trained_forms


def test_questions_of_a_split_are_never_shown_in_training(small_world):
    train = sentences("train")
    for split in ("validation", "test"):
        questions = fact_questions(split)
        assert questions
        assert not any(row["question"] in train for row in questions)
    assert sum(row["question"] in train for row in fact_questions("train")) > 0


def test_splits_cover_all_facts_in_the_stated_shares(small_world):
    counts = Counter(fact.split for fact in facts())
    total = counts.total()
    assert set(counts) == set(SPLITS)
    assert counts["test"] / total == pytest.approx(0.2, abs=0.06)
    assert counts["validation"] / total == pytest.approx(0.1, abs=0.05)
    assert sum(len(fact_questions(split)) for split in SPLITS) == total


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(small_world):
    for split in SPLITS:
        assert fact_texts(split, seed=3) == fact_texts(split, seed=3)
        assert fact_questions(split, seed=3) == fact_questions(split, seed=3)
        assert fact_texts(split, seed=3) != fact_texts(split, seed=4)


def test_a_dropped_country_moves_no_other_fact(small_world, monkeypatch):
    before = {(fact.entity, fact.relation): fact for fact in facts()}
    fewer = module._country_rows()[5:]
    monkeypatch.setattr(module, "_country_rows", lambda: fewer)
    for fact in facts():
        assert before[fact.entity, fact.relation] == fact


def test_questions_offer_the_right_answer_once_among_answers_of_the_same_relation(small_world):
    answers: dict[str, set[str]] = {}
    for fact in facts():
        answers.setdefault(fact.relation, set()).add(fact.answer)
    places = Counter()
    for row in fact_questions("train", choices=4):
        assert row["choices"].count(row["answer"]) == 1
        assert len(set(row["choices"])) == len(row["choices"]) == min(4, len(answers[row["relation"]]))
        assert set(row["choices"]) <= answers[row["relation"]]
        places[row["choices"].index(row["answer"])] += 1
    assert min(places[place] for place in range(4)) > 0


def test_prose_belongs_to_one_split(small_world):
    seen = Counter(row["text"] for split in SPLITS for row in fact_texts(split) if row["source"] == "description")
    assert len(seen) == 22  # elements 0, 4, 8, ..., 28 have no description
    assert set(seen.values()) == {1}
    assert "Belistanum. Soft metal number 2. Used in lamps." in seen


def test_every_relation_has_five_phrasings_that_name_entity_and_answer():
    for relation in RELATIONS.values():
        assert len(set(relation.phrasings)) == 5
        assert all(phrasing.count("{x}") == phrasing.count("{a}") == 1 for phrasing in relation.phrasings)
        assert relation.question.count("{x}") == 1 and "{a}" not in relation.question


def test_bad_arguments(small_world):
    with pytest.raises(ValueError, match="splits train, validation, test, got 'dev'"):
        fact_texts("dev")
    with pytest.raises(ValueError, match="at least 2"):
        fact_questions("test", choices=1)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "countryinfo", None)
    module._country_rows.cache_clear()
    with pytest.raises(ImportError, match=r"hf_transfer_ext\[demo\]"):
        facts()
    with (
        monkeypatch.context() as patched,
        pytest.raises(ImportError, match=r"countryinfo.*needs Python 3\.11 or later"),
    ):
        patched.setattr(sys, "version_info", (3, 10, 0))  # for which the package has no release
        facts()


def test_the_real_facts_are_true_and_enough():
    pytest.importorskip("countryinfo")
    pytest.importorskip("mendeleev")
    known = {(fact.entity, fact.relation): fact.answer for fact in facts()}
    assert len(known) > 1400
    assert known["France", "capital"] == "Paris"
    assert known["Japan", "currency"] == "JPY"
    assert known["the Bahamas", "region"] == "Latin America and the Caribbean"
    assert known["iron", "symbol"] == "Fe"
    assert known["gold", "number"] == "79"
    assert known["americium", "place"] == "the United States"
    words = {split: sum(len(row["text"].split()) for row in fact_texts(split)) for split in SPLITS}
    assert 25_000 < words["train"] < 40_000
    assert 1_500 < words["validation"] < words["test"] < 5_000
