from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="nats per token", higher_is_better=False, needs=("token_log_probs", "reference"))
def kl_to_reference(example: ScoredExample) -> tuple[float, float]:
    r"""Mean KL(reference || model) over the answer's tokens, with the full vocabulary.

    .. math:: \frac{1}{n} \sum_t \sum_v q_t(v) \ln \frac{q_t(v)}{p_t(v)}

    Returns:
        (nats per token, >= 0; number of tokens).

    Source: Kullback and Leibler, "On information and sufficiency", 1951, https://doi.org/10.1214/aoms/1177729694
    """
    divergence = example.answer.known("reference_kl")
    return float(divergence.mean()), float(len(divergence))
