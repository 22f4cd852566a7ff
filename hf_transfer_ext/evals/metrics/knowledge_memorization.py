from __future__ import annotations

import re

from hf_transfer_ext.evals.metric import metric
from hf_transfer_ext.evals.text.rouge import rouge_l_of_answer
from hf_transfer_ext.models.scoring import ScoredExample


@metric(unit="ROUGE-L F1", higher_is_better=False, needs=("generations",))
def knowledge_memorization(example: ScoredExample) -> float:
    """ROUGE-L F1 between the answer to a question about a text and what the model generates, in 32 tokens.

    MUSE uses few-shot examples; put them into the plain template. If the model continues with an empty line or another
    question, that part is cut off. Words are not stemmed. All of this is as in MUSE's code.

    Source: MUSE, Shi et al. 2024, section 3.1 (KnowMem), https://arxiv.org/abs/2407.06460
    """
    written = re.split(r"\n\n|Question:|\nQuestion", example.generation or "", maxsplit=1)[0]
    return rouge_l_of_answer(str(example.example["answer"]), written, stemmed=False)[2]
