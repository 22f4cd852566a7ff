from math import log

import pytest
from losses.unlearning.methods.objective import objective


def test_by_hand():
    # 3 nats per token of the refusal; the answer to retain and its refusal are equally likely: ln 2 / .1.
    forget = {"alternative_nll": [6.0], "alternative_lengths": [2.0]}
    assert objective("idk_ap", forget, {"nll": [5.0], "alternative_nll": [5.0]}) == pytest.approx(3 + 10 * log(2))


def test_refusing_what_is_to_be_retained_costs():
    forget = {"alternative_nll": [0.0], "alternative_lengths": [1.0]}
    refusing = objective("idk_ap", forget, {"nll": [50.0], "alternative_nll": [0.0]})
    assert refusing == pytest.approx(50.0, abs=0.1) and refusing > objective(
        "idk_ap", forget, {"nll": [0.0], "alternative_nll": [50.0]}
    )
