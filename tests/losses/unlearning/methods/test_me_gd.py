from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # The model has 3/4 and 1/4: KL(U || p) = -ln 2 - (ln 3/4 + ln 1/4) / 2.
    expected = -log(2) - (log(0.75) + log(0.25)) / 2 + log(4)
    assert objective("me_gd", {"logits": [[log(3), 0.0]]}, {"log_probs": [log(0.25)]}) == pytest.approx(expected)


def test_a_flat_distribution_is_forgotten_whatever_the_answer():
    assert objective("me_gd", {"logits": [[2.0, 2.0, 2.0]]}, {"log_probs": [0.0]}) == pytest.approx(0.0, abs=1e-12)
