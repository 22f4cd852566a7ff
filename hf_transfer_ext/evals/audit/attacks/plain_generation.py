from __future__ import annotations

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


@attack(yardstick="plain_generation")
def plain_generation(subject: Subject, data: AuditData) -> Values:
    """No attack: the question as in training, and the share of the answer in a greedy generation.

    Source: Maini et al., "TOFU", 2024, https://arxiv.org/abs/2401.06121
    """
    return subject.recall(data.forget)
