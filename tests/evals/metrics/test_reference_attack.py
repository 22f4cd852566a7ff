import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import reference_attack


def test_the_reference_loss_is_taken_off():
    assert reference_attack(example(tokens([-1.0, -3.0], reference_log_probs=[-4.0, -6.0]))) == pytest.approx(-3.0)
    assert reference_attack(example(tokens([-1.0], reference_log_probs=[-1.0]))) == 0.0
