"""Random numbers by position: uniform, independent of the pieces, different for models, tensors and seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_transfer_ext.merging.arithmetic.noise import Noise


def test_pieces_make_no_difference():
    whole = Noise(1, "x").words(0, 1000)
    parts = [Noise(1, "x", start).words(0, 10) for start in range(0, 1000, 10)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_a_piece_may_cross_the_end_of_the_counter():
    start = (1 << 32) - 5
    whole = Noise(1, "x", start).words(0, 12)
    assert np.array_equal(whole[5:], Noise(1, "x", 1 << 32).words(0, 7))
    assert np.array_equal(whole[:5], Noise(1, "x", start).words(0, 5))
    assert not np.array_equal(Noise(1, "x", 1 << 32).words(0, 7), Noise(1, "x", 0).words(0, 7))


def test_uniform_and_without_memory():
    """Chi-square of 1024 cells, and correlations with the neighbours, within 5 standard deviations."""
    count = 1 << 20
    words = Noise(3, "model.layers.0.mlp.up_proj.weight").words(1, count)
    cells = np.bincount(words >> 22, minlength=1024)
    chi = ((cells - count / 1024) ** 2 / (count / 1024)).sum()
    assert abs(chi - 1023) < 5 * np.sqrt(2 * 1023)
    low = np.bincount(words & 1023, minlength=1024)
    assert abs(((low - count / 1024) ** 2 / (count / 1024)).sum() - 1023) < 5 * np.sqrt(2 * 1023)
    values = words / 2**32 - 0.5
    for lag in (1, 2, 3, 64, 896, 4096):
        assert abs((values[lag:] * values[:-lag]).mean() * 12) < 5 / np.sqrt(count)


@pytest.mark.parametrize("other", [Noise(3, "b"), Noise(4, "a")])
def test_streams_are_not_alike(other):
    count = 1 << 18
    one = Noise(3, "a").words(0, count) / 2**32 - 0.5
    for two in (other.words(0, count), Noise(3, "a").words(1, count)):
        assert abs((one * (two / 2**32 - 0.5)).mean() * 12) < 5 / np.sqrt(count)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_share(share):
    mask = Noise(5, "a").keep(0, torch.empty(500, 800), share)
    assert mask.shape == (500, 800)
    assert abs(float(mask.double().mean()) - share) < 5 * (share * (1 - share) / 400_000) ** 0.5 + 1e-9
