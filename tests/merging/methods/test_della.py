"""della: the probability of an element grows with its rank in the row, and the expectation stays."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import close, elected, tensors

from hf_transfer_ext.merging import MERGE_METHODS
from hf_transfer_ext.merging.arithmetic.noise import Noise

della = MERGE_METHODS["della"]


def masked(change, noise, model, density, epsilon):
    """The definition, row by row. The random number of an element is that of its rank."""
    rows, columns = change.shape
    words = noise.words(model, change.numel()).reshape(rows, columns)
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        order = sorted(range(columns), key=lambda j: abs(float(change[i, j])))
        for rank, j in enumerate(order):
            p = density - epsilon + 2 * epsilon * rank / (columns - 1)
            if words[i, rank] / 2**32 < p:
                result[i, j] = float(change[i, j]) / p
    return result


def test_definition_given_the_random_numbers():
    base, models = tensors()
    noise = Noise(3, "x")
    kept = [masked(m - base, noise, i, 0.4, 0.3) for i, m in enumerate(models)]
    oracle = elected(base, kept, [0.5, 0.3, 0.7], True)
    options = {"weight": [0.5, 0.3, 0.7], "density": 0.4, "epsilon": 0.3, "noise": noise}
    close(della(base, models, **options), oracle)


def test_probabilities_and_expectation():
    base = torch.zeros(20_000, 4)
    model = torch.tensor([3.0, -1.0, 2.0, 4.0]).expand(20_000, 4)
    merged = della(base, [model], weight=1, density=0.5, epsilon=0.3, normalize=False)
    kept = (merged != 0).double().mean(0)
    expected = torch.tensor([0.6, 0.2, 0.4, 0.8], dtype=torch.float64)
    assert (kept - expected).abs().max() < 0.015  # 4 standard deviations
    assert (merged.double().mean(0) - model[0]).abs().max() < 0.08


def test_by_hand():
    base, model = torch.zeros(1, 2), torch.tensor([[1.0, -2.0]])
    values = {
        tuple(della(base, [model], weight=1, density=0.5, epsilon=0.25, noise=Noise(seed))[0].tolist())
        for seed in range(50)
    }
    smaller, larger = {0.0, 4.0}, {0.0, -2.0 / 0.75}
    assert all((a in smaller and b == pytest.approx(min(larger))) or b == 0 for a, b in values)
    assert len(values) == 4


def test_long_rows_are_ranked_by_the_whole_number():
    base, models = tensors(1, (2, 9000))
    noise = Noise(1, "y")
    kept = masked(models[0] - base, noise, 0, 0.5, 0.2)
    close(della(base, models, weight=1, density=0.5, epsilon=0.2, noise=noise), base + kept)


def test_a_spread_that_leaves_the_unit_interval_is_refused():
    base, models = tensors()
    with pytest.raises(ValueError, match="Choose a smaller epsilon"):
        della(base, models, weight=1, density=0.1, epsilon=0.15)
