from __future__ import annotations

import numpy as np

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


def mean_of_lowest(values: np.ndarray, share: float) -> float:
    """Mean of the lowest `share` of the values, but of at least one value."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"`share` must be in (0, 1], got {share}.")
    count = max(1, int(len(values) * share))
    return float(np.sort(values)[:count].mean())


@metric(unit="nats per token", higher_is_better=False)
def min_k(example: ScoredExample, *, share: float = 0.4) -> float:
    r"""Membership score: minus the mean log-probability of the least likely tokens. Higher means "not trained on".

    .. math:: -\frac{1}{|K|} \sum_{t \in K} \ln p(y_t \mid y_{<t}), \quad K = \text{lowest share of the tokens}

    Args:
        share: Share of tokens in (0, 1], rounded down, at least one token.

    Source: Shi et al., "Detecting pretraining data from large language models", 2024,
    https://arxiv.org/abs/2310.16789
    """
    return -mean_of_lowest(example.answer.log_probs, share)
