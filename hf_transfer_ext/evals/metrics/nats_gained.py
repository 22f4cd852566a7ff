from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="nats per token", higher_is_better=True, needs=("token_log_probs", "reference"))
def nats_gained(example: ScoredExample) -> tuple[float, float]:
    r"""By how much the model predicts the answer's tokens better than the reference: the paired difference of losses.

    .. math:: \frac{1}{n} \sum_t \ln p(y_t \mid y_{<t}) - \ln q(y_t \mid y_{<t})

    Both models read the same examples, so the interval of this difference is much narrower than those of the two
    losses: it shows gains that are hidden when two intervals are compared.

    Returns:
        (nats per token, above 0 if the model is better than the reference; number of tokens).

    Source: Koehn, "Statistical significance tests for machine translation evaluation", 2004 (paired bootstrap),
    https://aclanthology.org/W04-3250
    """
    gained = example.answer.log_probs - example.answer.known("reference_log_probs")
    return float(gained.mean()), float(len(gained))
