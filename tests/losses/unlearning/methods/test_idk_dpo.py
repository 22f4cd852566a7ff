from math import log

import pytest
from losses.unlearning.methods.objective import objective

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # Where model and reference agree it is (2 / .1) ln 2.
    forget = {"nll": [6.0], "reference_nll": [6.0], "alternative_nll": [2.0], "reference_alternative_nll": [2.0]}
    assert objective("idk_dpo", forget, {"log_probs": [log(0.25)]}) == pytest.approx(20 * log(2) + log(4))


def test_its_alternatives_are_refusals():
    assert METHODS["idk_dpo"].alternatives == "refusals"
