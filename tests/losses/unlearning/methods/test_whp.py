from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # The reinforced model raises the first logit by 1, which lowers the reference's 5 to 0: half and half is left.
    forget = {"logits": [[log(3), 0.0]], "reference_logits": [[5.0, 0.0]], "reinforced_logits": [[6.0, 0.0]]}
    expected = -0.5 * (log(0.75) + log(0.25)) + log(4)
    assert objective("whp", forget, {"log_probs": [log(0.25)]}) == pytest.approx(expected)
