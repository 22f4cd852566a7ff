"""Rounding itself, on real layers: tests/models/test_views.py; a whole step: tests/trainers/test_method_steps.py."""

import pytest
import torch
from losses.unlearning.methods.quadratics import Quadratics

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_by_hand():
    # At x = (1.4, -2) the forget gradient is (4.2, -2), and at the rounded (1, -2) it is (3, -2).
    step = Quadratics()
    step.x[0] = 1.4
    found = METHODS["qaf"](share=2.0).gradient(step)[0]
    torch.testing.assert_close(found, step.sum_of([(4.2 + 2 * 3) / 3, -2.0]), atol=1e-6, rtol=0)


def test_without_a_share_or_an_error_of_rounding_it_is_the_plain_sum():
    step = Quadratics()
    for share in (0.0, 3.0):
        torch.testing.assert_close(METHODS["qaf"](share=share).gradient(step)[0], step.sum_of([3.0, -2.0]))


@pytest.mark.parametrize("options, message", [({"bits": 1}, "from 2 to 8, got 1"), ({"share": -1.0}, "must be >= 0"),
                                              ({"block": 0}, "must be >= 1")])  # fmt: skip
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        METHODS["qaf"](**options)
