import pytest

from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning_method import Progress


def test_the_dual_follows_the_violation_by_hand():
    method = METHODS["pdu"](dual=2.0, dual_rate=5.0, bound=0.3, warmup_epochs=1.0)
    dual = method.start()
    assert method.weights(1.0, 1.0, Progress(0.0, 0.0), dual) == (1.0, 2.0)
    losses = {"forget": 9.0, "retain": 0.5}
    assert method.learn(dual, losses, Progress(0.1, 0.9)) == {"dual": 2.0}  # still warming up
    dual = method.learn(dual, losses, Progress(0.1, 1.0))
    assert dual["dual"] == pytest.approx(2.0 + 5 * 0.2)
    dual = method.learn(dual, {"forget": 9.0, "retain": 0.2}, Progress(0.2, 2.0))
    assert dual["dual"] == pytest.approx(3.0 - 5 * 0.1)


def test_it_never_gets_negative():
    method = METHODS["pdu"](dual=0.1, bound=3.0, warmup_epochs=0.0)
    assert method.learn(method.start(), {"forget": 1.0, "retain": 0.0}, Progress(0.5, 1.0)) == {"dual": 0.0}


@pytest.mark.parametrize("option", ["dual", "dual_rate", "bound", "warmup_epochs"])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"`{option}` must be >= 0, got -1"):
        METHODS["pdu"](**{option: -1.0})
