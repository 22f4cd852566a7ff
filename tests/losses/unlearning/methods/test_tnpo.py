from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # The weight is 1 where model and reference agree.
    forget = {"log_probs": [log(0.5)], "reference_log_probs": [log(0.5)]}
    assert objective("tnpo", forget, {"log_probs": [log(0.25)]}) == pytest.approx(log(2))
