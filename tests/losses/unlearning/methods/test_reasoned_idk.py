from math import exp, log

import pytest
from losses.unlearning.methods.objective import objective

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # The reasoned refusal gained 10 nats on the answer, at a beta of .1.
    forget = {"nll": [16.0], "reference_nll": [6.0], "alternative_nll": [2.0], "reference_alternative_nll": [2.0]}
    expected = 20 * log(1 + exp(-1)) + log(4)
    assert objective("reasoned_idk", forget, {"log_probs": [log(0.25)]}) == pytest.approx(expected)


def test_its_alternatives_are_reasoned():
    assert METHODS["reasoned_idk"].alternatives == "reasoned refusals"
