import numpy as np
import pytest

from hf_transfer_ext.evals.metrics import membership_auc, privleak
from hf_transfer_ext.measurement import Measurement


def auc(value):
    return Measurement("membership_auc", value, "area under the ROC curve", False, 10)


def test_by_hand():
    assert privleak(auc(0.5), auc(0.5)).value == 0.0
    assert privleak(auc(1.0), auc(0.5)).value == pytest.approx(-100.0)  # still tells every member
    assert privleak(auc(0.0), auc(0.5)).value == pytest.approx(100.0)  # pushed under unseen text
    assert privleak(auc(0.7), auc(0.6)).value == pytest.approx(100 * (0.3 - 0.4) / 0.4)


def test_an_impossible_area_is_refused():
    with pytest.raises(ValueError, match="trained on them"):
        privleak(auc(0.5), auc(1.0))
    with pytest.raises(ValueError, match="`unlearned`"):
        privleak(auc(1.5), auc(0.5))


def test_the_interval_is_that_of_resampled_scores():
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(size=80) - 0.5, rng.normal(size=80)
    ours = membership_auc(forget, holdout, resamples=0)
    theirs = membership_auc(forget + 0.5, holdout, resamples=0)
    scores = [forget, holdout, forget + 0.5, holdout]
    found = privleak(ours, theirs, scores=scores, resamples=200)
    assert found.interval[0] < found.value < found.interval[1] < 0
    assert privleak(ours, theirs).interval is None
    assert privleak(theirs, theirs, scores=[forget, holdout] * 2, resamples=50).interval == (0.0, 0.0)
