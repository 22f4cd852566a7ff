from __future__ import annotations

import numpy as np

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.evals.metrics.min_k import mean_of_lowest
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="standard deviations", higher_is_better=False, needs=("token_log_probs", "vocabulary_moments"))
def min_k_plus_plus(example: ScoredExample, *, share: float = 0.4) -> float:
    r"""Like `min_k`, with log-probabilities standardized by the model's distribution at each position.

    .. math:: \frac{\ln p(y_t) - \mu_t}{\sigma_t}, \quad \mu_t = \sum_v p(v) \ln p(v), \quad
        \sigma_t^2 = \sum_v p(v) (\ln p(v) - \mu_t)^2

    Positions with a one-token or uniform distribution (sigma below 1e-6) count as 0. Higher means "was not
    trained on".

    Source: Zhang et al., "Min-K%++", 2025, https://arxiv.org/abs/2404.02936
    """
    scores = example.answer
    deviation = scores.known("vocabulary_std")
    distance = scores.log_probs - scores.known("vocabulary_mean")
    standardized = np.divide(distance, deviation, out=np.zeros_like(distance), where=deviation > 1e-6)
    return -mean_of_lowest(standardized, share)
