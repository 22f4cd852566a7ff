from __future__ import annotations

import math

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="probability per token", higher_is_better=True)
def answer_probability(example: ScoredExample) -> float:
    r"""Probability of the answer, normalized by its length: the geometric mean of its tokens' probabilities.

    .. math:: P(a \mid q)^{1/n} = \exp(-\text{loss})

    Source: TOFU, Maini et al. 2024, section 2.2, https://arxiv.org/abs/2401.06121
    """
    return math.exp(-example.answer.loss)
