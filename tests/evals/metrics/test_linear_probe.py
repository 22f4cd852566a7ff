import numpy as np
import pytest

from hf_transfer_ext.evals.metrics import linear_probe


def test_it_reads_what_is_there_and_guesses_where_nothing_is():
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    noise = rng.normal(size=(90, 8))
    told = noise.copy()
    told[:, 2] += 8.0 * (labels == 1)
    told[:, 5] -= 8.0 * (labels == 2)
    found = linear_probe(told, labels)
    assert found.value > 0.95 and found.examples == 90
    assert abs(linear_probe(noise, labels).value - 1 / 3) < 0.2


def test_a_probe_is_never_asked_about_what_it_was_fitted_to():
    # More directions than examples: every fold is fitted perfectly, yet labels drawn at random cannot be predicted.
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, size=40)
    assert linear_probe(rng.normal(size=(40, 200)), labels).value < 0.75


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="got 1 classes"):
        linear_probe(np.zeros((10, 2)), np.zeros(10, dtype=int))
