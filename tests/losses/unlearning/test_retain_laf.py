import math

import pytest
import torch
from losses.unlearning.test_laf import parts_by_loops, states

from hf_transfer_ext.losses.unlearning import laf, retain_laf


def test_it_equals_the_definition_by_loops():
    expected = [s + 0.7 * c for s, c in parts_by_loops(*states())]
    assert retain_laf(*states(), contrast=0.7).tolist() == pytest.approx(expected, rel=1e-12)


def test_it_is_least_where_nothing_has_moved_and_largest_far_away():
    hidden, rebuilt, _ = states()
    assert retain_laf(hidden, hidden, hidden).tolist() == pytest.approx([1.0] * 5)
    far = retain_laf(-1e6 * hidden, rebuilt, hidden)
    assert far.tolist() == pytest.approx([math.e + 2.0] * 5, rel=1e-6)


def test_without_contrast_it_is_what_the_forget_loss_takes_back():
    lengths = torch.ones(5).double()
    assert (retain_laf(*states(), contrast=0.0) + laf(*states(), lengths, contrast=0.0)).abs().max() < 1e-12
