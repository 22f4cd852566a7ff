from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="nats per token", higher_is_better=False, needs=("token_log_probs", "reference"))
def reference_attack(example: ScoredExample) -> float:
    """Membership score: the mean loss minus the reference's. Higher means "was not trained on".

    The reference should be a model of the same kind that has not seen these examples.

    Source: Carlini et al., "Extracting training data from large language models", 2021,
    https://arxiv.org/abs/2012.07805
    """
    return example.answer.loss + float(example.answer.known("reference_log_probs").mean())
