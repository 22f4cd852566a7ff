from __future__ import annotations

import math
from collections.abc import Sequence

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


def share_of_true(true_loss: float, false_losses: Sequence[float]) -> float:
    """exp(-true) / (exp(-true) + sum of exp(-false)), from mean losses in nats per token."""
    lowest = min(true_loss, *false_losses)
    weights = [math.exp(lowest - loss) for loss in (true_loss, *false_losses)]
    return weights[0] / sum(weights)


@metric(unit="probability among the choices", higher_is_better=True, texts=("answer", "perturbed_answer"))
def choice_probability(example: ScoredExample) -> float:
    r"""Probability of the answer relative to the sum over it and the wrong answers, each normalized by its length.

    .. math:: \frac{P(a)}{P(a) + \sum_i P(\tilde a_i)}, \quad P(x) = \exp(-\text{loss}(x))

    TOFU uses it for its multiple-choice sets (real authors, world facts).

    Source: TOFU, Maini et al. 2024, section 2.2, https://arxiv.org/abs/2401.06121
    """
    return share_of_true(example.answer.loss, [wrong.loss for wrong in example.texts["perturbed_answer"]])
