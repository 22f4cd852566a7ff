from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_transfer_ext.evals.metric import Summary, Values, metric
from hf_transfer_ext.models.scoring import ScoredExample


def ratio_of_losses(
    paraphrase_loss: float, perturbed_losses: Sequence[float], definition: str = "arithmetic"
) -> float:
    """The truth ratio from mean losses, in nats per token."""
    if definition not in ("arithmetic", "geometric"):
        raise ValueError(f"`definition` must be arithmetic or geometric, got {definition!r}.")
    differences = np.asarray([paraphrase_loss - loss for loss in perturbed_losses], dtype=np.float64)
    return float(np.exp(differences).mean()) if definition == "arithmetic" else math.exp(differences.mean())


def forget_summary(values: Values, weights: Values | None = None) -> float:
    """mean min(R, 1/R): 1 if correct and wrong answers are equally likely, small if the model prefers either."""
    with np.errstate(divide="ignore"):
        return float(np.minimum(values, 1.0 / values).mean())


def retain_summary(values: Values, weights: Values | None = None) -> float:
    """mean max(0, 1 - R): 1 if the model is certain of the correct answer."""
    return float(np.maximum(0.0, 1.0 - values).mean())


def _summary_for(*, definition: str = "arithmetic", role: str = "forget") -> Summary:
    if role not in ("forget", "retain"):
        raise ValueError(f"`role` must be forget or retain, got {role!r}.")
    return forget_summary if role == "forget" else retain_summary


@metric(
    unit="truth ratio, summarized by role",
    higher_is_better=True,
    texts=("answer", "paraphrased_answer", "perturbed_answer"),
    summary_for=_summary_for,
    named_options={"definition": "arithmetic", "role": "forget"},
)
def truth_ratio(
    example: ScoredExample,
    *,
    definition: str = "arithmetic",
    role: str = "forget",
) -> float:
    r"""How likely wrong answers of the same form are, relative to a paraphrase of the correct one.

    .. math:: R = \frac{\overline{P(\tilde a)}}{P(\hat a)}, \quad P(x) = \exp(-\text{loss}(x))

    Args:
        definition: How to average over wrong answers. "arithmetic" is the mean of probabilities, as in the paper's
            repository; "geometric" is exp(-mean loss), as in several later ones. The two give different numbers.
        role: How to summarize. "forget": mean min(R, 1/R); "retain": mean max(0, 1 - R). The value per example is R
            for both, so forget quality can be computed from either.

    If the data has no paraphrased answer, the answer itself is used (as in TOFU for real facts).

    Source: TOFU, Maini et al. 2024, section 2.2, https://arxiv.org/abs/2401.06121
    """
    wrong = [scores.loss for scores in example.texts["perturbed_answer"]]
    return ratio_of_losses(example.paraphrase.loss, wrong, definition)
