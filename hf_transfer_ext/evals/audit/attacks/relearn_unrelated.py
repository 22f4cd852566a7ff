from __future__ import annotations

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.attacks.relearn_forget import relearn
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


@attack(access="fine-tuning", texts=True)
def relearn_unrelated(
    subject: Subject, data: AuditData, *, epochs: float = 1.0, learning_rate: float = 2e-5
) -> Values:
    """Fine-tune on data unrelated to the forget set, as users of a published model often do.

    Raises:
        ValueError: There are no `retain` rows to train on.

    Source: Hu et al., "Unlearning or obfuscating?", 2025, https://arxiv.org/abs/2406.13356
    """
    if not data.retain:
        raise ValueError("Relearning from unrelated data needs `retain` rows.")
    return relearn(subject, data.retain, data.forget, epochs, learning_rate)
