import pytest
import torch
from losses.unlearning.methods.quadratics import Quadratics

from hf_transfer_ext.losses.unlearning.methods import METHODS


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_the_penalty_fades_by_hand(share):
    step = Quadratics(share)
    found = METHODS["l1_sparse"](penalty=0.8).gradient(step)[0]
    expected = step.sum_of([3.0, -2.0]) + 0.8 * (1 - share) * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(found, expected)


def test_a_negative_penalty_is_refused():
    with pytest.raises(ValueError, match="`penalty` must be >= 0, got -1"):
        METHODS["l1_sparse"](penalty=-1)
