from __future__ import annotations

import math

from hf_transfer_ext.evals.metric import Values, metric, weighted_mean
from hf_transfer_ext.evals.metrics.nats_per_token import nats_per_token
from hf_transfer_ext.models.scoring import ScoredExample


def _perplexity_of_set(values: Values, weights: Values) -> float:
    return math.exp(weighted_mean(values, weights))


@metric(unit="exp(nats per token)", higher_is_better=False, summary=_perplexity_of_set)
def perplexity(example: ScoredExample) -> tuple[float, float]:
    r"""exp of `nats_per_token`: the number of equally likely choices that would be equally hard to guess.

    The per-example values stay in nats per token; the exponential is applied once, to the mean over all tokens.

    Returns:
        (nats per token, number of tokens); the summary is their exponential, >= 1.

    Source: Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks", 1977,
    https://doi.org/10.1121/1.2016299
    """
    return nats_per_token(example)
