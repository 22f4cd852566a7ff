from math import log

import pytest
from losses.unlearning.methods.objective import objective

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # 2 nats per token of the rationale with its wrong answer.
    forget = {"alternative_nll": [10.0], "alternative_lengths": [5.0]}
    assert objective("unstar", forget, {"log_probs": [log(0.5)]}) == pytest.approx(2 + log(2))


def test_its_alternatives_are_misleading_rationales():
    assert METHODS["unstar"].alternatives == "misleading rationales"
