from __future__ import annotations

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


@attack(texts=True)
def plain_question(subject: Subject, data: AuditData) -> Values:
    """No attack: the question as in training, and the probability of its answer (of the whole text if a row has no
    question).

    Source: Maini et al., "TOFU", 2024, https://arxiv.org/abs/2401.06121
    """
    return subject.probability(data.forget)
