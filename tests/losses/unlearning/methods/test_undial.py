from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # The reference's 10 for the answer is lowered by 10: the target is half and half.
    forget = {"logits": [[0.0, 0.0]], "reference_logits": [[10.0, 0.0]], "targets": [0]}
    assert objective("undial", forget) == pytest.approx(log(2))
