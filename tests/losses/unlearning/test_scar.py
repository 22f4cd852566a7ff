import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import scar
from hf_transfer_ext.losses.unlearning.scar import bent


def bent_by_loops(row):
    size = math.sqrt(sum(value**2 for value in row) / len(row))
    powered = [value / size / math.sqrt(abs(value / size) + 1e-3) for value in row]
    length = math.sqrt(sum(value**2 for value in powered))
    return [value / length for value in powered]


def test_it_equals_the_definition_by_loops():
    draw = torch.Generator().manual_seed(0)
    hidden, reference, centers = (torch.randn(n, 3, dtype=torch.float64, generator=draw) for n in (4, 4, 5))
    whitening = torch.randn(3, 3, dtype=torch.float64, generator=draw)
    precision = whitening @ whitening.T
    targets, tokens = [1, 2, 0, 3], [0, 1, 2, 0, 3]

    def distance(row, center):
        gap = torch.tensor(bent_by_loops(row), dtype=torch.float64) - center
        return float((gap @ precision @ gap).sqrt())

    expected = []
    for state, before, target in zip(hidden.tolist(), reference.tolist(), targets, strict=True):
        others = [c for c, token in zip(centers, tokens, strict=True) if token != target]
        expected.append(distance(state, min(others, key=lambda c: distance(before, c))))
    found = scar(hidden, reference, torch.tensor(targets), centers, torch.tensor(tokens), whitening)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_nearest_cluster_of_the_own_token_does_not_count_by_hand():
    hidden = bent(torch.tensor([[1.0, 0.0]]).double())
    centers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).double()
    found = scar(hidden, hidden, torch.tensor([7]), centers, torch.tensor([7, 8, 9]), torch.eye(2).double())
    assert found.item() == pytest.approx(math.sqrt(2.0), rel=1e-6)


def test_bent_states_have_length_one_and_keep_their_signs():
    row = torch.tensor([[4.0, -1.0, 0.0]]).double()
    found = bent(row)
    assert found.norm().item() == pytest.approx(1.0) and found.sign().tolist() == row.sign().tolist()
    assert (found[0, 0] / -found[0, 1]).item() == pytest.approx(2.0, rel=1e-2)  # roots of 4 and of 1
    torch.testing.assert_close(bent(3 * row), found)
