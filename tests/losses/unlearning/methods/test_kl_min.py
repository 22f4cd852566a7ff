from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # The reference has 3/4 and 1/4 where the model has halves.
    retain = {"logits": [[0.0, 0.0]], "reference_logits": [[log(3), 0.0]]}
    kl = 0.75 * log(1.5) + 0.25 * log(0.5)
    assert objective("kl_min", {"log_probs": [log(0.5)]}, retain) == pytest.approx(log(0.5) + kl)


def test_at_the_start_only_the_ascent_counts():
    same = {"logits": [[1.0, -2.0]], "reference_logits": [[1.0, -2.0]]}
    assert objective("kl_min", {"log_probs": [-0.7]}, same) == pytest.approx(-0.7)
