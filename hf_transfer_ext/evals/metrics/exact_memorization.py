from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="share of tokens", higher_is_better=True)
def exact_memorization(example: ScoredExample) -> float:
    """Share of the answer's tokens that are the model's first choice, given all tokens before them.

    Source: Tirumala et al., "Memorization without overfitting", 2022, https://arxiv.org/abs/2205.10770
    """
    return float(example.answer.first_choice.mean())
