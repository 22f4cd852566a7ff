from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # The reference has 3/4 and 1/4 where the model has halves.
    retain = {"logits": [[0.0, 0.0]], "reference_logits": [[log(3), 0.0]]}
    kl = 0.75 * log(1.5) + 0.25 * log(0.5)
    forget = {"nll": [6.0], "reference_nll": [6.0]}
    assert objective("npo_kl", forget, retain) == pytest.approx(20 * log(2) + kl)
