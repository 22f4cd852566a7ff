from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="share of questions", higher_is_better=True, texts=("answer", "perturbed_answer"))
def choice_accuracy(example: ScoredExample) -> float:
    """1 if the model assigns the answer a higher probability per token than every wrong answer, else 0.

    Guessing gives 1 / (number of choices). Normalizing by length keeps short choices from winning by being short; it
    is `acc_norm` of lm-evaluation-harness, with tokens instead of characters.

    Source: Language models are few-shot learners, Brown et al. 2020, section 2.4, https://arxiv.org/abs/2005.14165
    """
    return float(all(example.answer.loss < wrong.loss for wrong in example.texts["perturbed_answer"]))
