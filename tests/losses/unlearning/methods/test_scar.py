import math

import pytest
import torch
from losses.unlearning.methods.answers import Answers, hidden_pass

from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning.methods.scar import whitening_of
from hf_transfer_ext.losses.unlearning.scar import bent


def test_clusters_are_the_mean_states_of_the_tokens_that_come_often():
    states = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    targets = [5, 5, 8, 8, 8, 2, 5, 8, 9]
    half = [lambda: hidden_pass(states[:4], targets[:4]), lambda: hidden_pass(states[4:], targets[4:])]
    found = METHODS["scar"](clusters=3, least=3).prepare(Answers({"retain": half}))
    assert found["cluster_tokens"].tolist() == [8, 5]  # the most frequent first
    for token, center in zip([8, 5], found["cluster_centers"], strict=True):
        own = [bent(states[i : i + 1])[0] for i, t in enumerate(targets) if t == token]
        torch.testing.assert_close(center, torch.stack(own).mean(0))
    within = [bent(states[i : i + 1])[0].double() - found["cluster_centers"][[8, 5].index(t)].double()
              for i, t in enumerate(targets) if t in (8, 5)]  # fmt: skip
    covariance = sum(torch.outer(x, x) for x in within) / len(within)
    torch.testing.assert_close(found["whitening"].double(), whitening_of(covariance, 3.0), atol=1e-5, rtol=1e-4)


def test_the_covariance_is_shrunk_twice_scaled_and_inverted_by_loops():
    root = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = (root @ root.T).tolist()
    for _ in range(2):
        variance = sum(matrix[i][i] for i in range(4)) / 4
        between = sum(matrix[i][j] for i in range(4) for j in range(4) if i != j) / 12
        matrix = [[matrix[i][j] + 2.0 * (variance if i == j else between) for j in range(4)] for i in range(4)]
    scaled = [[matrix[i][j] / math.sqrt(matrix[i][i] * matrix[j][j]) for j in range(4)] for i in range(4)]
    whitening = whitening_of(root @ root.T, 2.0)
    torch.testing.assert_close(whitening @ whitening, torch.linalg.inv(torch.tensor(scaled).double()))


def test_without_shrinkage_a_direction_without_variance_does_not_count():
    whitening = whitening_of(torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double(), 0.0)
    assert (whitening @ torch.tensor([1.0, -1.0]).double()).abs().max() < 1e-9


def test_too_little_text_and_bad_options_are_refused():
    few = Answers({"retain": [lambda: hidden_pass(torch.ones(3, 2), [4, 4, 4])]})
    with pytest.raises(ValueError, match="found 1; it needs 2"):
        METHODS["scar"]().prepare(few)
    for option, least in (("clusters", 1), ("least", 0), ("shrinkage", -1.0)):
        with pytest.raises(ValueError, match=f"`{option}` must be >="):
            METHODS["scar"](**{option: least})
