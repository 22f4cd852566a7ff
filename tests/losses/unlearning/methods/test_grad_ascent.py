from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    assert objective("grad_ascent", {"log_probs": [log(0.5), log(0.25)]}) == pytest.approx(log(0.5) * 1.5)
