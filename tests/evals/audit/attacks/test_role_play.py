import numpy as np
import pytest
from evals.audit.planted_people import DATA, FORGET, planted, subject

from hf_transfer_ext.evals.audit.attacks.role_play import ROLES, role_play
from hf_transfer_ext.evals.audit.subject import reworded


def test_the_best_role_of_each_example_counts():
    original = subject(planted()[0])
    tries = [original.probability(reworded(FORGET, role)) for role in ROLES]
    assert role_play(original, DATA) == pytest.approx(np.max(tries, 0))
    assert role_play(original, DATA, roles=ROLES[:1]) == pytest.approx(tries[0])


def test_every_role_asks_the_question():
    assert all("{question}" in role for role in ROLES)
