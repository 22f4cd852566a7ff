from importlib import import_module

import numpy as np
import pytest
import torch
from evals.audit.planted_people import DATA, FORGET, HOLDOUT, PLAIN, RETAIN, planted, subject
from tiny import byte_tokenizer

from hf_transfer_ext.evals.audit.attacks.hidden_probe import (
    hidden_probe,
    parts_of,
    probe_by_layer,
    ridge_direction,
    states_of_answers,
)
from hf_transfer_ext.evals.audit.subject import AuditData


def planted_states(monkeypatch, shift, seed=0):
    """Kept rows lie on one side of a direction in layer 1, unseen rows on the other; the forget rows at `shift`."""
    noise = np.random.default_rng(seed)
    sides = np.r_[np.full(len(FORGET), shift), np.full(len(RETAIN), 4.0), np.full(len(HOLDOUT), -4.0)]
    states = noise.normal(size=(len(sides), 2, 6))
    states[:, 1, 2] += sides
    module = import_module("hf_transfer_ext.evals.audit.attacks.hidden_probe")
    monkeypatch.setattr(module, "states_of_answers", lambda subject, rows: states)


@pytest.mark.parametrize("shift, expected", [(4.0, 1.0), (-40.0, 0.0)])
def test_the_probe_says_on_which_side_the_forgotten_are(monkeypatch, shift, expected):
    planted_states(monkeypatch, shift)
    anyone = subject(planted()[2])
    area, above = probe_by_layer(anyone, DATA)
    assert area[1] == 1.0 and area[1] > area[0]
    assert hidden_probe(anyone, DATA).tolist() == above[1].tolist() == [expected] * len(FORGET)


def test_rows_that_are_as_unseen_as_the_holdout_are_put_in_its_middle(monkeypatch):
    found = []
    for seed in range(12):
        planted_states(monkeypatch, -4.0, seed)
        found.append(hidden_probe(subject(planted()[2]), DATA).mean())
    assert abs(np.mean(found) - 0.5) < 0.15


def test_states_are_the_means_over_the_answer_whatever_the_batch():
    model = planted()[0]
    row = FORGET[1]
    encoded = PLAIN.encode(byte_tokenizer(), row["question"], row["answer"])
    with torch.no_grad():
        layers = model(torch.tensor([encoded.input_ids]), output_hidden_states=True).hidden_states
    expected = np.stack([layer[0, encoded.answer_start :].double().mean(0).numpy() for layer in layers])
    assert states_of_answers(subject(model), [*FORGET, *RETAIN])[1] == pytest.approx(expected, abs=1e-5)


def test_the_direction_is_that_of_the_penalised_least_squares():
    rng = np.random.default_rng(1)
    known, unknown = rng.normal(size=(4, 7)), rng.normal(size=(3, 7))
    mean, deviation, weights = ridge_direction(known, unknown, 0.3)
    inputs = (np.concatenate([known, unknown]) - mean) / deviation
    sides = np.r_[np.full(4, 1 / 4), np.full(3, -1 / 3)]
    # The same in the space of dimensions: (X'X / d + ridge)^-1 X' y.
    primal = np.linalg.solve(inputs.T @ inputs / 7 + 0.3 * np.eye(7), inputs.T @ sides)
    assert weights == pytest.approx(primal)


def test_rows_about_one_person_stay_together_and_missing_rows_are_told():
    rows = [{"person": 7}, {"person": 3}, {"person": 7}, {"person": 5}]
    assert parts_of(rows, 2).tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="4 `retain` and 0 `holdout`"):
        hidden_probe(subject(planted()[0]), AuditData(FORGET, RETAIN))
    alone = [{**row, "person": 0} for row in HOLDOUT]
    with pytest.raises(ValueError, match="two persons each"):
        hidden_probe(subject(planted()[0]), AuditData(FORGET, RETAIN, alone))
