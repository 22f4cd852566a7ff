import pytest

from hf_transfer_ext.evals.metrics import privleak
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
