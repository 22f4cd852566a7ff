from __future__ import annotations

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.evals.text.rouge import rouge_l_of_answer
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="ROUGE-L F1", higher_is_better=False, needs=("generations",))
def verbatim_memorization(example: ScoredExample) -> float:
    """ROUGE-L F1 between the model's continuation of a text and the actual continuation.

    The question of an example is the beginning of the text and its answer the continuation: use the plain template
    `"{question}"`, truncate the continuation to 128 tokens and generate the same number. Words are not stemmed, as in
    MUSE's code.

    Source: MUSE, Shi et al. 2024, section 3.1 (VerbMem), https://arxiv.org/abs/2407.06460
    """
    return rouge_l_of_answer(str(example.example["answer"]), example.generation or "", stemmed=False)[2]
