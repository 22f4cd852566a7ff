from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # The refusal's token has probability 1/2; the models agree on the retain set.
    same = {"logits": [[1.0, -2.0]], "reference_logits": [[1.0, -2.0]]}
    expected = 0.5 * (log(2 / 1.5) + 0.5 * log(2) + 0.5 * log(1 / 1.5))
    assert objective("jensun", {"logits": [[0.0, 0.0]], "refusal_targets": [0]}, same) == pytest.approx(expected)


def test_it_is_bounded_by_two_ln_two():
    far = {"logits": [[0.0, 99.0]], "reference_logits": [[99.0, 0.0]]}
    assert objective("jensun", {"logits": [[0.0, 99.0]], "refusal_targets": [0]}, far) == pytest.approx(2 * log(2))
