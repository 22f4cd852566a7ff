import numpy as np
import pytest

from hf_transfer_ext.evals.metrics import retention
from hf_transfer_ext.measurement import Measurement


def points(*values, name="accuracy", higher=True):
    return [Measurement(name, value, "share", higher, 10) for value in values]


def test_by_hand_in_both_directions():
    assert retention(*points(0.2, 0.6, 0.3, 0.6)).value == pytest.approx(0.75)
    assert retention(*points(8.0, 4.0, 6.0, 5.0, name="perplexity", higher=False)).value == pytest.approx(0.25)
    assert retention(*points(0.2, 0.6, 0.3, 0.1)).value == pytest.approx(-0.5)


def test_no_gain_and_mixed_metrics_are_refused():
    with pytest.raises(ValueError, match="not a gain"):
        retention(*points(0.6, 0.6, 0.3, 0.6))
    with pytest.raises(ValueError, match="one metric"):
        retention(*points(0.2, 0.6, 0.3), *points(0.4, name="rouge"))


def test_interval_over_the_examples():
    rng = np.random.default_rng(0)
    scores = [(rng.random(400) < p).astype(float) for p in (0.2, 0.8, 0.3, 0.6)]
    found = retention(*points(*(one.mean() for one in scores)), scores=scores, resamples=300)
    low, high = found.interval
    assert low < found.value < high and 0.2 < high - low < 0.5
    assert retention(*points(0.2, 0.8, 0.3, 0.6)).interval is None
    few = [np.array(one, dtype=float) for one in ([0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0])]
    assert retention(*points(*(one.mean() for one in few)), scores=few).interval is None  # some draws have no gain
