from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # p = 1/2: the weight is (1/2)^5 (1/2), and the forget loss counts a tenth.
    expected = 0.1 * 0.5**6 * log(0.5) - log(0.25)
    assert objective("satimp", {"log_probs": [log(0.5)]}, {"log_probs": [log(0.25)]}) == pytest.approx(expected)
