"""Random: any rows, the baseline of every other selection."""

from __future__ import annotations

import torch

from hf_transfer_ext.data.candidates import Candidates


def random(candidates: Candidates, count: int, *, seed: int = 0) -> list[int]:
    """Choose rows uniformly, without replacement.

    When to use it: as the baseline of any other choice.

    Args:
        count: How many, from 1.
        seed: Other seeds give other rows; a larger count with the same seed holds the smaller one.

    Returns:
        Places of the rows, ascending.

    Source: this package's own.
    """
    candidates.check_count(count)
    order = torch.randperm(candidates.rows, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())
