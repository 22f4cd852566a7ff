from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # Where model and reference agree it is (2 / .1) ln 2.
    forget = {"nll": [6.0], "reference_nll": [6.0]}
    assert objective("npo", forget, {"log_probs": [log(0.25)]}) == pytest.approx(20 * log(2) + log(4))


def test_what_is_forgotten_leaves_the_retain_loss():
    forget = {"nll": [900.0], "reference_nll": [1.0]}
    assert objective("npo", forget, {"log_probs": [-2.0]}) == pytest.approx(2.0)
