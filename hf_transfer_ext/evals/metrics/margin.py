from __future__ import annotations

import numpy as np

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="nats", higher_is_better=True)
def margin(example: ScoredExample) -> float:
    r"""Mean margin of the answer's tokens: the token's logit minus the log-sum-exp of all other logits.

    .. math:: z_y - \ln \sum_{v \ne y} e^{z_v} = \ln \frac{p_y}{1 - p_y}

    Clipped to +-100 for tokens with a probability of 1 or 0 in floating point. `klom` compares these values.

    Source: Georgiev et al., "Attribute-to-delete: machine unlearning via datamodel matching", 2024,
    https://arxiv.org/abs/2410.23232
    """
    log_p = example.answer.log_probs
    with np.errstate(divide="ignore"):
        log_rest = np.log(-np.expm1(np.minimum(log_p, 0.0)))
    return float(np.clip(log_p - log_rest, -100.0, 100.0).mean())
