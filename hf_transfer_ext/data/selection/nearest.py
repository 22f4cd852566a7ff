"""Nearest: the rows most like given ones."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.data.candidates import Candidates, largest


def nearest(candidates: Candidates, count: int, *, query: Float[Tensor, "queries features"]) -> list[int]:
    r"""Choose the rows whose features have the largest cosine with the mean direction of the queries.

    .. math:: s_i = \frac{x_i \cdot m}{\lVert x_i \rVert \lVert m \rVert}, \quad
        m = \sum_q \frac{q}{\lVert q \rVert}

    When to use it: neighbors of what is to be forgotten, as a retain set that protects what lies closest, or as the
    hardest rows of a holdout. With gradients as features it is a nearest-influence selection.

    Args:
        count: How many, from 1.
        query: Features of the rows that the others are compared with, as those of the candidates.

    Returns:
        Places of the rows, ascending; of equally near ones the first. A row of zeros has the cosine 0.

    Source: the neighbor sets of RWKU, Jin et al. 2024, https://arxiv.org/abs/2406.10890, by features instead of links
    """
    candidates.check_count(count)
    features = candidates.need("features", "nearest").double()
    if query.shape[0] == 0 or query.shape[1] != features.shape[1]:
        raise ValueError(f"`query` has to be (queries, {features.shape[1]}) with a row at least: {list(query.shape)}.")
    direction = torch.nn.functional.normalize(query.double(), dim=1).sum(0)
    scores = torch.nn.functional.normalize(features, dim=1) @ torch.nn.functional.normalize(direction, dim=0)
    return largest(scores, count)
