import math

import pytest
import torch
from losses.vectors.vectors_problem import problem, times

from hf_transfer_ext.losses.vectors import lealla, similarity_mse


def unit(vector):
    length = math.sqrt(sum(v * v for v in vector))
    return [v / length for v in vector]


def test_it_is_features_on_the_unit_sphere_and_similarities():
    student, teacher, w = problem(width=3)
    features = [0.0] * 3
    for side in range(2):
        for row in range(3):
            own = unit(times(w.tolist(), student[side, row].tolist()))
            other = unit(teacher[side, row].tolist())
            features[row] += sum((a - b) ** 2 for a, b in zip(own, other, strict=True)) / 4 / 2
    found = lealla(student, teacher, w, feature_weight=10.0, logit_weight=0.5)
    expected = 10 * torch.tensor(features) + 0.5 * similarity_mse(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert lealla(student, student).abs().max() < 1e-6


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=">= 0"):
        lealla(*problem()[:2], logit_weight=-1.0)
