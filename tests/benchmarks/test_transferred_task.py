"""The benchmark of transfers: its task, and its table says what its records say."""

from __future__ import annotations

import re

from benchmarks import transferred_task
from benchmarks.transferred_task import DIRECTIONS, METHODS, entries, report, runs_of


def test_no_family_name_or_city_of_the_test_is_in_training():
    parts = {}
    for split in ("train", "test"):
        rows = entries(split)
        assert len({row["question"] for row in rows}) == len(rows) == transferred_task.EXAMPLES[split]
        parts[split] = (
            {row["question"].split(",")[0].split()[1] for row in rows},
            {row["question"].split(", ")[2] for row in rows},
        )
    assert not parts["train"][0] & parts["test"][0] and not parts["train"][1] & parts["test"][1]


def test_an_answer_follows_from_its_question():
    for row in entries("test"):
        name, date, city = row["question"].split(", ")
        given, family = name.split()
        day, month, year = date.split()
        found = re.fullmatch(r"(\S+), (\w)\. \((\d{4})-(\d\d)-(\d\d)\) (.+)", row["answer"]).groups()
        number = transferred_task.MONTHS.index(month) + 1
        assert found == (family, given[0], year, f"{number:02}", f"{int(day):02}", city)


def result(seeds):
    right, wrong, half = [1.0] * 10, [0.0] * 10, [1.0] * 5 + [0.5] * 5
    tokens = {"gemma": wrong, "student": wrong}
    for seed in seeds:
        tokens[f"gemma {seed}"] = right
        for method in METHODS:
            tokens[f"down {method} {seed}"] = {"copy": half, "true data": right, "trans_lora": right}.get(
                method, wrong
            )
    notes = {f"down trans_lora {seed}": {"acceptance": 0.5} for seed in seeds}
    return {"tokens": tokens, "notes": notes | {f"gemma {seed}": {"separation": 0.75} for seed in seeds}}


def test_the_table():
    text = report(result([0, 1]), "command")
    assert "Seeds: 0, 1." in text and "ranks 75% of the pairs" in text and "accepted 50% of" in text
    row = next(line for line in text.splitlines() if line.startswith("| copy"))
    cells = [cell.split(" (")[0].strip() for cell in row.split("|")[2:6]]
    assert cells == ["50.0%", "50.0%", "50.0%", "75.0%"]
    assert "copy: better than random" in text and "project: no better than random" in text
    assert text.count("Not measured.") == 2  # the other directions


def test_seeds_that_are_not_finished_are_left_out():
    found = result([0, 1])
    del found["tokens"]["down ridge 1"]
    assert list(runs_of(found, "down")) == [0] and runs_of(found, "up") == {}
    assert set(DIRECTIONS) == {"down", "up", "across"}


def test_a_refused_closed_form_is_listed_with_its_reason():
    found = result([0])
    del found["tokens"]["down copy 0"]
    found["notes"]["down copy 0"] = {"refused": "the shapes differ"}
    text = report(found, "command")
    assert "Seeds: 0." in text and "Refused: copy: the shapes differ" in text and "| copy" not in text
