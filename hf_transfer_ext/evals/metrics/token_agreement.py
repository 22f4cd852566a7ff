from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="share of tokens", higher_is_better=True, needs=("token_log_probs", "reference"))
def token_agreement(example: ScoredExample) -> tuple[float, float]:
    """Share of the answer's tokens for which model and reference have the same first choice.

    Returns:
        (share, number of tokens).

    Source: Stanton et al., "Does knowledge distillation really work?", 2021 (top-1 agreement),
    https://arxiv.org/abs/2106.05945
    """
    agrees = example.answer.known("reference_agrees")
    return float(agrees.mean()), float(len(agrees))
