"""Translation ranking by its definition in loops."""

import math

import pytest
import torch

from hf_transfer_ext.losses.ranking import translation_ranking


def test_it_is_a_softmax_with_a_margin_in_both_directions():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 3, generator=random, dtype=torch.float64)
    cos = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1).tolist()
    expected = []
    for i in range(4):
        right = math.exp(5 * (cos[i][i] - 0.2))
        one = right + sum(math.exp(5 * cos[i][j]) for j in range(4) if j != i)
        two = right + sum(math.exp(5 * cos[j][i]) for j in range(4) if j != i)
        expected.append(-math.log(right / one) - math.log(right / two))
    found = translation_ranking(x, y, margin=0.2, scale=5.0)
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-5, atol=1e-6)
    assert translation_ranking(x[:1], y[:1]).item() == 0.0  # alone in its batch, nothing can be confused
    with pytest.raises(ValueError, match="margin"):
        translation_ranking(x, y, margin=-1.0)
