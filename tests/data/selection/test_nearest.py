import math

import pytest
import torch

from hf_transfer_ext.data.candidates import Candidates
from hf_transfer_ext.data.selection.nearest import nearest


def test_cosines_by_the_definition():
    torch.manual_seed(0)
    features, query = torch.randn(20, 5), torch.randn(3, 5)
    direction = [sum(float(q[j]) / math.dist(q.tolist(), [0] * 5) for q in query) for j in range(5)]
    cosines = []
    for row in features.tolist():
        dot = sum(a * b for a, b in zip(row, direction, strict=True))
        cosines.append(dot / math.dist(row, [0] * 5) / math.dist(direction, [0] * 5))
    expected = sorted(sorted(range(20), key=lambda i: -cosines[i])[:6])
    assert nearest(Candidates(20, features=features), 6, query=query) == expected


def test_an_example_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0], [0.0, 0.0], [-1.0, 0.0]])
    query = torch.tensor([[5.0, 0.0]])
    assert nearest(Candidates(5, features=features), 1, query=query) == [0]
    assert nearest(Candidates(5, features=features), 3, query=query) == [0, 1, 2]  # cosines 1, 0 (first of equals), .7


def test_lengths_do_not_matter():
    torch.manual_seed(1)
    features, query = torch.randn(30, 4), torch.randn(2, 4)
    scaled = features * (1 + 9 * torch.rand(30, 1))
    one = nearest(Candidates(30, features=features), 7, query=query)
    assert one == nearest(Candidates(30, features=scaled), 7, query=torch.tensor([[2.0], [7.0]]) * query)


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="`nearest` needs `features`"):
        nearest(Candidates(3), 1, query=torch.ones(1, 2))
    with pytest.raises(ValueError, match="`query` has to be"):
        nearest(Candidates(3, features=torch.ones(3, 2)), 1, query=torch.ones(1, 3))
    with pytest.raises(ValueError, match="NaN"):
        Candidates(1, features=torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="`losses` has 2 rows, and there are 3"):
        Candidates(3, losses=torch.ones(2))
