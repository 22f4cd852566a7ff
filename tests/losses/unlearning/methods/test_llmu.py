import pytest
from losses.unlearning.methods.objective import objective

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # 2 nats a token on the answer, at half weight, 3 on the random one; the models agree on the retain set.
    forget = {"nll": [8.0], "lengths": [4.0], "alternative_nll": [6.0], "alternative_lengths": [2.0]}
    same = {"logits": [[1.0, -2.0]], "reference_logits": [[1.0, -2.0]]}
    assert objective("llmu", forget, same) == pytest.approx(3 - 2 / 2)


def test_its_alternatives_are_answers_to_retain():
    assert METHODS["llmu"].alternatives == "retain answers"
