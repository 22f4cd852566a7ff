"""The benchmark of forgotten people: equal budgets, disjoint people, and a table that says what its records say."""

from __future__ import annotations

import pytest

from benchmarks import requests_in_sequence, unlearned_people
from benchmarks.unlearned_people import (
    ACCESS,
    EDITS,
    PEOPLE,
    TRIALS,
    is_frontier,
    markdown,
    people_of,
    plot,
    searched,
    summary_of,
)
from hf_transfer_ext.losses.unlearning.methods import METHODS


@pytest.mark.parametrize("method", [*METHODS, *EDITS])
def test_every_method_has_the_same_number_of_different_trials(method):
    trials = searched(method, lambda settings: {"forgotten": 0.5})
    assert len(trials) == TRIALS == len({str(trial["settings"]) for trial in trials})


def test_a_search_gets_stronger_until_enough_is_forgotten_and_weaker_after_a_failure():
    looks = iter([{"forgotten": 0.2}, {"forgotten": 0.95}, {"forgotten": 0.2}, {"forgotten": 0.0, "error": "nan"}] * 2)
    rates = [trial["settings"]["learning_rate"] for trial in searched("undial", lambda settings: next(looks))]
    assert rates[0] < rates[1] > rates[2] < rates[3] > rates[4]
    assert rates[1] == pytest.approx(3 * rates[0])


def test_utility_and_the_choice_are_of_people_that_no_method_gets_and_nobody_retrained_knows_the_forgotten():
    rows = people_of(0)
    people = {part: {row["person"] for row in rows[part]} for part in PEOPLE}
    assert {part: len(own) for part, own in people.items()} == PEOPLE
    assert len(set.union(*people.values())) == sum(PEOPLE.values())
    learned = {name: {row["person"] for row in rows[name]} for name in ("original", "retrained")}
    assert learned["original"] == set.union(*(own for part, own in people.items() if part != "holdout"))
    assert learned["retrained"] == learned["original"] - people["forget"]


def row(seed, utility, worst, **more):
    attacks = {access: {"attack": "a", "recovered": worst} for access in ACCESS}
    numbers = {"forget_probability": 0.1, "forget_rouge": 0.1, "extraction_strength": 0.1, "utility_rouge": 0.9}
    return {"method": "npo", "seed": seed, "settings": {"alpha": 1.0}, "utility": utility, "rounded": worst,
            "forget_quality": 0.01, "worst": {**attacks, **more}, **numbers}  # fmt: skip


def test_a_summary_is_the_mean_over_seeds_and_membership_recovers_nothing():
    high = {"membership": {"attack": "loss_attack", "recovered": 1.0}, "weights": None}
    found = summary_of("npo", [row(0, 0.8, 0.2, **high), row(1, 0.6, 0.4, **high)])
    assert found["utility"] == pytest.approx(0.7) and found["recovered"] == pytest.approx(0.3)
    assert found["membership"] == 1.0 and found["weights"] is None
    assert found["log10_forget_quality"] == pytest.approx(-2.0) and found["seeds"] == 2


def test_the_table_sorts_by_the_worst_attack_and_marks_the_frontier(tmp_path):
    summaries = [
        summary_of(name, [{**row(0, utility, worst), "method": name}])
        for name, utility, worst in (("npo", 0.9, 0.5), ("rmu", 0.8, 0.6), ("idk", 0.7, 0.1), ("original", 1.0, 1.0))
    ]
    assert [one["method"] for one in summaries[:3] if is_frontier(one, summaries[:3])] == ["npo", "idk"]
    result = {"summaries": summaries, "failed": {"whp": "why"}, "rows": [],
              "machine": {"processor": "p", "cores": 2, "versions": {}}}  # fmt: skip
    text = markdown(result)
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names[1:6] == ["---", "original", "**idk**", "**npo**", "rmu"] and "- whp: why" in text
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_small_run_is_measured_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unlearned_people, "PEOPLE", dict.fromkeys(PEOPLE, 2))
    monkeypatch.setattr(unlearned_people, "WIDTH", 48)
    monkeypatch.setattr(unlearned_people, "TRIALS", 2)
    monkeypatch.setattr(unlearned_people, "EPOCHS", 1)
    monkeypatch.setattr(unlearned_people, "ATTACKS", ("plain_question", ("quantization", {"bits": 4})))
    monkeypatch.setitem(unlearned_people.TEACHING, "epochs", 1)
    words = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--seeds", "0", "--methods"]
    unlearned_people.main([*words, "original", "npo", "--minutes", "0"])
    assert "The time is up" in capsys.readouterr().out and not (tmp_path / "out.json").exists()
    unlearned_people.main([*words, "original", "npo"])
    measured = unlearned_people.stored(tmp_path / "work", "npo", 0)
    assert len(measured["trials"]) == 2 and set(measured["attacks"]) >= {"plain_question", "quantization(bits=4)"}
    assert "npo" in (tmp_path / "out.md").read_text() and (tmp_path / "out.png").exists()
    capsys.readouterr()
    unlearned_people.main([*words, "original", "npo"])
    assert capsys.readouterr().out == ""  # nothing is measured twice


def test_the_table_of_requests_shows_every_count():
    rows = [
        {"requests": n, "seconds": 1.0, "utility": 0.9, "forgotten": 0.5, "oldest": 0.25}
        for n in requests_in_sequence.COUNTS
    ]
    found = [{"method": "npo", "way": way, "seed": 0, "rows": rows} for way in requests_in_sequence.WAYS]
    text = requests_in_sequence.markdown(found)
    assert text.count("50% / 25% / 0.90") == 8 and "| npo | stacked | 1 |" in text
