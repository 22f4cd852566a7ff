from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # The token to forget has probability 1/2, which is also its weight.
    assert objective("wga", {"log_probs": [log(0.5)]}, {"log_probs": [log(0.25)]}) == pytest.approx(
        0.5 * log(0.5) - log(0.25)
    )
