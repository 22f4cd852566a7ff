from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="nats per token", higher_is_better=False)
def loss_attack(example: ScoredExample) -> float:
    """Membership score: the mean loss. Higher means "was not trained on".

    Source: Yeom et al., "Privacy risk in machine learning", 2018, https://arxiv.org/abs/1709.01604
    """
    return example.answer.loss
