import dataclasses

import pytest
import torch
from adapters.transfer.pairs import SIZES, dense, twin, with_target

from hf_transfer_ext.adapters.transfer.methods.cross_lora import cross_lora
from hf_transfer_ext.weights.lora import LoraFactors


@pytest.mark.parametrize("kind", SIZES)
def test_a_base_in_other_coordinates_gets_the_change_in_those_coordinates(kind):
    pair, expected = twin(kind, rotated=True)
    torch.testing.assert_close(dense(cross_lora(pair)), expected, rtol=1e-3, atol=1e-3)


def test_without_the_alignment_the_signs_of_the_decomposition_would_decide():
    """The published form pairs directions by number; the map of the residual stream makes them agree instead."""
    pair, expected = twin("up_proj", rotated=True)
    left_s, _, right_s = torch.linalg.svd(pair.source, full_matrices=False)
    left_t, _, right_t = torch.linalg.svd(pair.target, full_matrices=False)
    unaligned = left_t @ left_s.T @ dense(pair.change) @ right_s.T @ right_t
    signs = torch.ones(12)
    signs[::2] = -1
    flipped = (left_t * signs) @ left_s.T @ dense(pair.change) @ right_s.T @ right_t
    assert (flipped - unaligned).norm() / unaligned.norm() > 0.5
    assert (dense(cross_lora(pair)) - expected).norm() / expected.norm() < 1e-3


def test_what_lies_outside_the_weights_own_directions_is_not_carried():
    """A tall layer writes into as many directions as it reads: a change in the others is lost, also between equals."""
    pair, _ = twin("up_proj")
    outside = torch.linalg.svd(pair.source, full_matrices=True).U[:, 12:15]
    lost = dataclasses.replace(pair, change=LoraFactors(outside, pair.change.right))
    torch.testing.assert_close(dense(cross_lora(lost)), torch.zeros(20, 12), rtol=0, atol=1e-5)


def test_between_shapes_it_stays_in_the_leading_directions():
    pair, _ = twin("up_proj")
    target = torch.randn(30, 8, generator=torch.Generator().manual_seed(3))
    narrow = torch.randn(12, 8, generator=torch.Generator().manual_seed(4))
    other = with_target(pair, target, narrow)
    carried = dense(cross_lora(other, subspace=4))
    assert carried.shape == (30, 8)
    left, _, right = torch.linalg.svd(target, full_matrices=False)
    inside = left[:, :4] @ left[:, :4].T @ carried @ right[:4].T @ right[:4]
    torch.testing.assert_close(inside, carried, rtol=1e-3, atol=1e-3)


def test_what_touches_no_residual_stream_and_bad_options_are_refused():
    pair, _ = twin("up_proj")
    with pytest.raises(ValueError, match="nothing aligns its directions"):
        cross_lora(dataclasses.replace(pair, residual_map=torch.zeros(7, 7)))
    with pytest.raises(ValueError, match="`subspace` must be at least 1"):
        cross_lora(pair, subspace=0)
    with pytest.raises(ValueError, match="has to declare the need"):
        cross_lora(dataclasses.replace(pair, residual_map=None))
