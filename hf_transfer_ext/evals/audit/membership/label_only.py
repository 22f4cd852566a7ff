from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_transfer_ext.evals.audit.references import References
from hf_transfer_ext.evals.audit.subject import Row, Subject, reworded
from hf_transfer_ext.evals.metric import Values

WORDINGS = ("{question}", "Please tell me: {question}")


def label_only(
    subject: Subject,
    rows: Sequence[Row],
    references: References,
    *,
    wordings: Sequence[str] = WORDINGS,
    samples: int = 0,
    temperature: float = 1.0,
) -> Values:
    """Membership from generated text only: minus the mean share of the answer in the generations.

    Scores are in [-1, 0]; the lower, the likelier the row was trained on. The model
    still generates an answer it was trained on when the question is reworded, and in several samples; probabilities
    are not used.

    Args:
        wordings: Wordings of the question, each answered greedily.
        samples: Samples per wording in addition to the greedy answer, at `temperature`.

    Deviations: ROUGE-L recall of whole answers, where Kaneko et al. count n-grams of continued texts and
    Choquette-Choo et al. labels of augmented pictures.

    Source: Choquette-Choo et al., "Label-only membership inference attacks", 2021, https://arxiv.org/abs/2007.14321;
    Kaneko et al., "Sampling-based pseudo-likelihood for membership inference attacks", 2024,
    https://arxiv.org/abs/2404.11262
    """
    if not wordings:
        raise ValueError("`wordings` is empty: there is nothing to ask.")
    questions = [reworded(rows, wording) for wording in wordings]
    recalls = [subject.recall(one) for one in questions]
    recalls += [subject.recall(one, temperature=temperature, seed=i) for one in questions for i in range(samples)]
    return -np.stack(recalls).mean(0)
