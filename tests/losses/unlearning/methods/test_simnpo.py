from math import log

import pytest
from losses.unlearning.methods.objective import objective

from hf_transfer_ext.losses.needs import needs_of
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # ln 2 nats per token, times 4.5; the forget loss counts an eighth.
    forget = {"nll": [2 * log(2)], "lengths": [2.0]}
    expected = 0.125 * (2 / 4.5) * log(1 + 2**-4.5) + log(4)
    assert objective("simnpo", forget, {"log_probs": [log(0.25)]}) == pytest.approx(expected)


def test_it_asks_for_no_reference():
    method = METHODS["simnpo"]
    needs = needs_of(UNLEARNING_LOSSES[method.forget]) + needs_of(RETAIN_LOSSES[method.retain])
    assert not any(need.of_reference for need in needs)
