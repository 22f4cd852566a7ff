from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # ln(1/2) of the answer to forget, -ln(1/4) of the one to retain.
    assert objective("grad_diff", {"log_probs": [log(0.5)]}, {"log_probs": [log(0.25)]}) == pytest.approx(log(2))


def test_the_two_losses_cancel_on_the_same_answers():
    same = {"log_probs": [-1.5, -0.25]}
    assert objective("grad_diff", same, same) == 0.0
