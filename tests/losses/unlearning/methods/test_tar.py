import pytest
import torch
from losses.unlearning.methods.quadratics import Quadratics

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # The answers' loss rises along (1, -1) in signs: the attacker goes from (1, -2) to (.9, -1.9), then (.8, -1.8).
    step = Quadratics()
    found = METHODS["tar"](inner_steps=2, inner_rate=0.1).gradient(step)[0]
    forget = [3 * (1 + 0.9 + 0.8) / 3, -(2 + 1.9 + 1.8) / 3]
    torch.testing.assert_close(found, step.sum_of(forget), atol=1e-6, rtol=0)
    assert step.x.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("options", [{"inner_steps": 0}, {"inner_rate": 0.0}])
def test_an_attacker_that_does_not_move_leaves_the_plain_sum(options):
    step = Quadratics()
    torch.testing.assert_close(METHODS["tar"](**options).gradient(step)[0], step.sum_of([3.0, -2.0]))


@pytest.mark.parametrize("option", ["inner_steps", "inner_rate"])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"`{option}` must be >= 0, got -1"):
        METHODS["tar"](**{option: -1})
