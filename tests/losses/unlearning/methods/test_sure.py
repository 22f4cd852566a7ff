from types import SimpleNamespace

import pytest
import torch
from losses.unlearning.methods.quadratics import Quadratics

from hf_transfer_ext.losses.unlearning.methods import METHODS


class Whole(Quadratics):
    """A step with a matrix of four neurons, and a vector of one."""

    gamma = alpha = 1.0
    forget = (torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [0.0, 0.0]]), torch.tensor([-7.0]))

    def gradient(self, part, around=None):
        return [g.clone() if part == "forget" else torch.ones_like(g) for g in self.forget]


@pytest.mark.parametrize("quantile, kept", [(0.8, [10.0]), (0.6, [10.0, 7.0]), (0.0, [10.0, 7.0, 5.0, 1.0])])
def test_the_mask_by_hand(quantile, kept):
    # The neurons' gradients are 5, 1, 10, 0 and 7 long. One without a gradient is never trained.
    masks = METHODS["sure"](quantile=quantile).prepare(Whole())
    assert masks["0"].tolist() == [length in kept for length in (5.0, 1.0, 10.0, 0.0)]
    assert masks["1"].tolist() == [7.0 in kept]


def test_only_masked_neurons_get_a_gradient():
    method, step = METHODS["sure"](quantile=0.6), Whole()
    step.prepared = method.prepare(step)
    matrix, vector = method.gradient(step)
    assert matrix.tolist() == [[0, 0], [0, 0], [7, 9], [0, 0]] and vector.tolist() == [-6]


def test_what_would_freeze_or_move_everything_is_refused():
    for quantile in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="`quantile` must be"):
            METHODS["sure"](quantile=quantile)
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 would shrink"):
        METHODS["sure"]().check(SimpleNamespace(weight_decay=0.1))
