import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import exact_memorization


def test_by_hand():
    assert exact_memorization(example(tokens([-1.0] * 4, [True, False, True, True]))) == pytest.approx(0.75)
