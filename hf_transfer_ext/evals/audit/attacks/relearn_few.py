from __future__ import annotations

import numpy as np

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.attacks.relearn_forget import relearn
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


@attack(access="fine-tuning", texts=True)
def relearn_few(subject: Subject, data: AuditData, *, epochs: float = 3.0, learning_rate: float = 2e-5) -> Values:
    """Fine-tune on one half of the forget set and ask about the other half, and vice versa.

    Recovered knowledge was not in the attacker's rows, so it must have been in the model.

    Source: Łucki et al., "An adversarial perspective on machine unlearning for AI safety", 2025,
    https://arxiv.org/abs/2409.18025
    """
    if len(data.forget) < 2:
        raise ValueError("Relearning from half of the forget set needs at least two examples.")
    values = np.zeros(len(data.forget))
    for known in (0, 1):
        rows = [row for i, row in enumerate(data.forget) if i % 2 == known]
        others = [row for i, row in enumerate(data.forget) if i % 2 != known]
        values[1 - known :: 2] = relearn(subject, rows, others, epochs, learning_rate)
    return values
