import numpy as np
import pytest

from hf_transfer_ext.evals.metrics import negative_flip_rate


def test_by_hand():
    right = np.array([0, 0, 0, 0, 0])
    old = np.array([0, 0, 1, 1, 2])
    new = np.array([0, 1, 0, 1, 1])  # kept, broken, mended, wrong as before, wrong in another way
    flips, choices = negative_flip_rate(old, new, right)
    assert flips.value == pytest.approx(1 / 5) and choices.value == pytest.approx(2 / 5)
    assert flips.interval[0] <= 0.2 <= flips.interval[1]


def test_a_model_does_not_flip_against_itself():
    old = np.array([0, 1, 2])
    assert [m.value for m in negative_flip_rate(old, old, np.array([0, 0, 0]))] == [0.0, 0.0]
