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
