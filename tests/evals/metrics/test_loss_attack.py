import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import loss_attack


def test_by_hand():
    assert loss_attack(example(tokens([-1.0, -3.0]))) == pytest.approx(2.0)
