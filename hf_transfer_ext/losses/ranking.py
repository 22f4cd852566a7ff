"""Translation ranking: the right other side of a pair among those of the whole batch, with a margin."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def translation_ranking(
    sources: Float[Tensor, "rows width"],
    targets: Float[Tensor, "rows width"],
    *,
    margin: float = 0.3,
    scale: float = 20.0,
) -> Float[Tensor, " rows"]:
    r"""In-batch softmax with an additive margin, in both directions.

    .. math:: - \log \frac{e^{s (\cos(x_i, y_i) - m)}}
              {e^{s (\cos(x_i, y_i) - m)} + \sum_{j \ne i} e^{s \cos(x_i, y_j)}}

    plus the same with x and y exchanged. The other rows of the batch are the negatives, so that it depends on which
    rows share a batch, and on its size.

    Args:
        margin: m, taken off the cosine of the right pair, >= 0.
        scale: s, > 0; LaBSE's softmax has none, which for cosines means a very flat one.

    Returns:
        Nats for each row, the sum of both directions, >= 0.

    Source: Yang et al. 2019, equations 3 to 6, https://arxiv.org/abs/1902.08564
    """
    if margin < 0 or not scale > 0:
        raise ValueError(f"`margin` must be >= 0 and `scale` > 0, got {margin} and {scale}.")
    cosines = normalize(sources.float(), dim=-1) @ normalize(targets.float(), dim=-1).T
    scores = scale * (cosines - margin * torch.eye(len(cosines), device=cosines.device))
    right = torch.arange(len(scores), device=scores.device)
    return sum(cross_entropy(one, right, reduction="none") for one in (scores, scores.T))  # type: ignore[return-value]
