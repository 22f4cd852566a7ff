import math

import numpy as np
import pytest

from hf_transfer_ext.evals.metrics import klom


def test_by_hand():
    # One example, two bins: unlearned margins half and half, the oracles' 3 to 1.
    unlearned, oracles = np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([[0.0], [0.0], [0.0], [1.0]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = klom(unlearned, oracles, bins=2)
    assert found.value == pytest.approx(expected, rel=1e-4) and found.unit == "nats" and not found.higher_is_better


def test_equal_models_cannot_be_told_apart_and_others_can():
    rng = np.random.default_rng(0)
    models = rng.normal(size=(100, 20))
    assert klom(models, models).value == 0.0
    same = klom(models, rng.normal(size=(100, 20))).value
    shifted = klom(models + 2.0, rng.normal(size=(100, 20))).value
    assert shifted > 5 * same > 0


def test_margins_are_clipped_and_constant_ones_are_equal():
    assert klom(np.full((3, 2), 500.0), np.full((4, 2), 100.0)).value == 0.0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="same examples: 2 unlearned and 3"):
        klom(np.zeros((4, 2)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="at least two models"):
        klom(np.zeros((1, 2)), np.zeros((4, 2)))
