from math import exp, log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # Without the answer's token, two others are left, with 2/3 and 1/3.
    forget = {"logits": [[5.0, log(2), 0.0]], "targets": [0]}
    total = exp(5) + 3
    expected = -(2 / 3) * log(2 / total) - (1 / 3) * log(1 / total)
    assert objective("ce_u", forget) == pytest.approx(expected)
