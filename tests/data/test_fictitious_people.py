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


@pytest.mark.parametrize(
    "options, message", [({"people": 4, "forget": 2, "holdout": 2}, "one retained"), ({"facts": 13}, "from 1 to 12")]
)
def test_impossible_counts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fictitious_people(**options)
