"""The benchmark of robust unlearning: what it runs, what it costs, and a table that says what its records say."""

from __future__ import annotations

import pytest

from benchmarks import robust_unlearning, unlearned_people
from benchmarks.robust_unlearning import cost, markdown


def row(again, seed, recovered):
    worst = {access: {"attack": "a", "recovered": recovered} for access in unlearned_people.ACCESS}
    return {"method": "npo", "again": again, "seed": seed, "settings": {"alpha": 1.0}, "utility": 0.9, "worst": worst,
            "forget_probability": 0.1, "attacks": {"multiple_choice": recovered}}  # fmt: skip


def test_the_cost_is_the_share_of_rows_that_are_read():
    rows = {"given": [0] * 8, "choice": [0] * 5, "test": [0] * 5, "forget": [0] * 2, "retrained": [0] * 40}
    assert cost(rows, unlearned_people.TEACHING["epochs"]) == 0.5


def test_the_table_has_the_mean_and_the_range_over_seeds():
    text = markdown([row(None, 0, 0.8), row([0.6, 16], 0, 0.2), row([0.6, 16], 1, 0.4)])
    lines = [line for line in text.splitlines() if line.startswith("| npo")]
    assert lines[0].startswith("| npo | 1 | ") and "| 80% |" in lines[0]
    assert lines[1].startswith("| npo, then share 0.6 and 16 passes | 2 | ") and "| 30% (20% to 40%) |" in lines[1]


@pytest.mark.slow
def test_a_small_run_is_measured_and_goes_on(tmp_path, monkeypatch, capsys):
    for name, value in (("PEOPLE", dict.fromkeys(unlearned_people.PEOPLE, 2)), ("WIDTH", 48), ("TRIALS", 2)):
        monkeypatch.setattr(unlearned_people, name, value)
    monkeypatch.setattr(unlearned_people, "EPOCHS", 1)
    monkeypatch.setattr(unlearned_people, "ATTACKS", ("plain_question", "multiple_choice"))
    monkeypatch.setattr(robust_unlearning, "RUNS", ((0.6, 1),))
    monkeypatch.setitem(unlearned_people.TEACHING, "epochs", 1)
    words = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--seeds", "0", "--methods", "npo"]
    robust_unlearning.main(words)
    text = (tmp_path / "out.md").read_text()
    assert "| npo | 1 |" in text and "| npo, then share 0.6 and 1 passes | 1 |" in text
    assert "seed 0  npo (0.6, 1)" in capsys.readouterr().out
    robust_unlearning.main(words)
    assert "seed 0" not in capsys.readouterr().out  # nothing is measured twice
