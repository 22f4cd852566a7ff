from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="nats per token", higher_is_better=False)
def nats_per_token(example: ScoredExample) -> tuple[float, float]:
    r"""Mean negative log-likelihood of the answer's tokens (of the text's tokens if an example only has text).

    .. math:: -\frac{1}{n} \sum_t \ln p(y_t \mid y_{<t})

    Over a set, it is the mean over all *tokens*, so long examples count more than short ones.

    Returns:
        (nats per token, number of tokens).

    Source: Shannon, "Prediction and entropy of printed English", 1951,
    https://doi.org/10.1002/j.1538-7305.1951.tb01366.x
    """
    return example.answer.loss, float(len(example.answer))
