import hashlib
import json
import random

import pytest

from hf_transfer_ext.data.fictitious_people import FACTS, PERTURBED, fictitious_people


def rows_of(splits):
    return [row for rows in splits.values() for row in rows]


def test_the_same_seed_gives_the_same_people_whatever_else_was_drawn():
    random.seed(5)
    first = fictitious_people(8, seed=3)
    random.seed(6)
    assert fictitious_people(8, seed=3) == first
    assert fictitious_people(8, seed=4) != first
    digest = hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "e8c7a208d67c2c24", (
        "the people of a seed have changed: results of older runs cannot be compared"
    )


def test_more_people_leave_the_first_ones_as_they_are():
    few, many = fictitious_people(6, forget=2, holdout=1), fictitious_people(30, forget=2, holdout=5)
    assert many["forget"] == few["forget"]
    assert many["retain"][: len(few["retain"])] == few["retain"]


def test_splits_are_by_person_and_of_the_size_asked():
    splits = fictitious_people(10, forget=2, holdout=3, facts=4)
    people = {name: {row["person"] for row in rows} for name, rows in splits.items()}
    assert people == {"forget": {0, 1}, "retain": {2, 3, 4, 5, 6}, "holdout": {7, 8, 9}}
    assert {name: len(rows) for name, rows in splits.items()} == {"forget": 8, "retain": 20, "holdout": 12}


def test_every_row_has_the_schema_and_its_answers_say_what_they_should():
    rows = rows_of(fictitious_people(40))
    assert len(rows) == 40 * len(FACTS)
    for row in rows:
        assert row["name"] in row["question"] and row["name"] in row["paraphrased_question"]
        assert row["question"] != row["paraphrased_question"] and row["question"].endswith("?")
        assert row["value"] in row["answer"] and row["value"] in row["paraphrased_answer"]
        assert row["answer"] != row["paraphrased_answer"]
        wrong = row["perturbed_answer"]
        assert len(set(wrong)) == PERTURBED and row["paraphrased_answer"] not in wrong
        # A wrong answer is the paraphrase with another value, and with nothing else changed.
        start, end = row["paraphrased_answer"].split(row["value"], 1)
        assert all(text.startswith(start) and text.endswith(end) for text in wrong)


def test_names_are_unique_and_texts_varied():
    rows = rows_of(fictitious_people(300))
    assert len({row["name"] for row in rows}) == 300
    for fact in FACTS:
        own = [row for row in rows if row["fact"] == fact]
        assert len({row["question"].replace(row["name"], "N") for row in own}) == 3
        assert len({row["answer"].replace(row["name"], "N").replace(row["value"], "V") for row in own}) == 3
        assert len({row["value"] for row in own}) >= 13


FACETS = {"phrasings": 2, "languages": ("de", "es", "fr"), "multi_hop": 48}


def test_facets_leave_the_plain_questions_and_each_other_as_they_are():
    plain, full = fictitious_people(8, seed=3), fictitious_people(8, seed=3, **FACETS)
    assert {name: full[name] for name in plain} == plain
    for facet, value in FACETS.items():
        alone = fictitious_people(8, seed=3, **{facet: value})
        assert set(alone) == {*plain, *(f"{split}_{facet}" for split in plain)}
        assert all(full[name] == rows for name, rows in alone.items())
    few = fictitious_people(8, seed=3, languages=("es",), multi_hop=5, phrasings=1)
    spanish = [row for row in full["forget_languages"] if row["language"] == "es"]
    assert few["forget_languages"] == spanish
    hops = [row for row in full["forget_multi_hop"] if row["person"] == 0][:6]
    assert [row for row in few["forget_multi_hop"] if row["person"] == 0] == hops


def test_two_people_can_be_asked_two_hundred_questions():
    full = fictitious_people(8, **FACETS)
    asked = {name: len(rows) for name, rows in full.items() if name.startswith("forget")}
    assert asked == {"forget": 24, "forget_phrasings": 48, "forget_languages": 42, "forget_multi_hop": 98}
    questions = [row["question"] for rows in full.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_rows_of_facets_have_the_schema_and_agree_with_the_plain_facts():
    full = fictitious_people(12, **FACETS)
    plain = {(row["person"], row["fact"]): row for split in ("forget", "retain", "holdout") for row in full[split]}
    for name, rows in full.items():
        for row in rows:
            assert {*plain[0, "pet"]} <= {*row} and "{" not in "".join(row["perturbed_answer"]) + row["question"]
            assert row["value"] in row["answer"] and row["value"] in row["paraphrased_answer"]
            assert row["question"] != row["paraphrased_question"] and row["answer"] != row["paraphrased_answer"]
            wrong = row["perturbed_answer"]
            assert len(set(wrong)) == PERTURBED and row["paraphrased_answer"] not in wrong
            start, end = row["paraphrased_answer"].rsplit(row["value"], 1)
            assert all(text.startswith(start) and text.endswith(end) for text in wrong)
            if row["fact"] != "neighbor":
                assert row["value"] == plain[row["person"], row["fact"]]["value"]
            assert ("name" in row) and (row["name"] in row["question"]) == (row.get("hops") != 2), name


def test_multi_hop_questions_describe_the_person_by_a_fact_that_is_taught():
    full = fictitious_people(12, **FACETS)
    plain = {(row["person"], row["fact"]): row["value"] for split in ("forget", "retain") for row in full[split]}
    for row in full["forget_multi_hop"] + full["retain_multi_hop"]:
        if row["hops"] == 1:
            plain[row["person"], "neighbor"] = row["value"]
    for row in full["forget_multi_hop"] + full["retain_multi_hop"]:
        assert row["value"] == plain[row["person"], row["fact"]]
        if row["hops"] == 2:
            assert plain[row["person"], row["described_by"]] in row["question"] and row["fact"] != row["described_by"]
            assert f"{plain[row['person'], row['described_by']]}'s" not in row["question"] + row["answer"]


def test_the_facets_of_a_seed_stay():
    digest = hashlib.sha256(json.dumps(fictitious_people(8, seed=3, **FACETS), sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "570a5f2c0788f5b6"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"people": 4, "forget": 2, "holdout": 2}, "one retained"),
        ({"facts": 13}, "from 1 to 12"),
        ({"phrasings": 3}, "from 0 to 2"),
        ({"multi_hop": 49}, "from 0 to 48"),
        ({"multi_hop": 1, "facts": 3}, "from 0 to 0"),
        ({"languages": ["deu"]}, "Did you mean 'de'"),
    ],
)
def test_impossible_counts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fictitious_people(**options)
