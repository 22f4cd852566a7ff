from __future__ import annotations

from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


def paraphrased_question(subject: Subject, data: AuditData) -> Values:
    """The question in other words: the column `paraphrased_question`, or the question as a request where it is absent.

    Source: Patil et al., "Can sensitive information be deleted from LLMs?", 2024 (rephrasing attacks),
    https://arxiv.org/abs/2309.17410
    """
    rows = [
        {**row, "question": row.get("paraphrased_question") or f"Please tell me: {row['question']}"}
        for row in data.forget
    ]
    return subject.probability(rows)
