import numpy as np
import pytest

from hf_transfer_ext.evals.metrics import membership_tpr


def test_by_hand():
    nonmembers = np.arange(100.0)  # one of a hundred may be taken: the threshold is 1
    members = np.array([-1.0, 0.0, 0.5, 1.0, 50.0])
    assert membership_tpr(members, nonmembers).value == pytest.approx(3 / 5)
    assert membership_tpr(members, nonmembers, false_positive_rate=0.0).value == pytest.approx(1 / 5)
    assert membership_tpr(members, nonmembers, false_positive_rate=0.6).value == 1.0


def test_a_rate_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="got 1"):
        membership_tpr(np.array([1.0]), np.array([1.0]), false_positive_rate=1.0)
