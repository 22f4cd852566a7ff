import numpy as np
import pytest

from hf_transfer_ext.evals.metrics import membership_auc


def test_it_counts_pairs_and_half_of_the_ties():
    members, nonmembers = np.array([1.0, 2.0, 4.0]), np.array([2.0, 3.0])
    pairs = [1.0 if m < n else 0.5 if m == n else 0.0 for m in members for n in nonmembers]
    assert membership_auc(members, nonmembers).value == pytest.approx(sum(pairs) / 6)


def test_sides_and_guessing():
    low, high = np.arange(50.0), np.arange(50.0) + 100
    assert membership_auc(low, high).value == 1.0
    assert membership_auc(high, low).value == 0.0
    found = membership_auc(low, low)
    assert found.value == pytest.approx(0.5) and found.interval[0] < 0.5 < found.interval[1]


def test_no_score_and_nan_are_named():
    with pytest.raises(ValueError, match="`members` needs scores"):
        membership_auc(np.array([]), np.array([1.0]))
    with pytest.raises(ValueError, match=r"NaN at index \[0\]"):
        membership_auc(np.array([1.0]), np.array([np.nan]))
