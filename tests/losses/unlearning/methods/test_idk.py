from math import log

import pytest
from losses.unlearning.methods.objective import objective

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # 3 nats per token of the refusal.
    forget = {"alternative_nll": [6.0], "alternative_lengths": [2.0]}
    assert objective("idk", forget, {"log_probs": [log(0.25)]}) == pytest.approx(3 + log(4))


def test_its_alternatives_are_refusals():
    assert METHODS["idk"].alternatives == "refusals"
