import pytest
import torch

from hf_transfer_ext.evals.metrics import concept_vector_distance


def test_by_hand():
    unembedding = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    before, after = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0])
    # Products before: 1, .9, 0, -1; after: .5, .55, 1, -.5. The two highest: {0, 1} and {2, 1}.
    jaccard, cosine, distance = concept_vector_distance(before, after, unembedding, top=2)
    assert jaccard.value == pytest.approx(1 / 3)
    assert cosine.value == pytest.approx(0.5 / 1.25**0.5)
    assert distance.value == pytest.approx(1.25**0.5)


def test_an_untouched_vector():
    vector, unembedding = torch.randn(8), torch.randn(50, 8)
    values = [m.value for m in concept_vector_distance(vector, vector, unembedding, top=10)]
    assert values == [1.0, pytest.approx(1.0), 0.0]
    with pytest.raises(ValueError, match="from 1 to the 50 tokens"):
        concept_vector_distance(vector, vector, unembedding)
