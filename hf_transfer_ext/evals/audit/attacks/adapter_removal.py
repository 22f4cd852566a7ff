from __future__ import annotations

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


@attack(access="weights", texts=True, floor_attack="plain_question")
def adapter_removal(subject: Subject, data: AuditData) -> Values:
    """Remove the adapter that was trained to unlearn: anyone who has the adapter and the base model can do so.

    Raises:
        ValueError: The model is not a `PeftModel`; if the adapter was merged, there is nothing to remove.

    Source: this package's own check; it only needs the published files.
    """
    if not hasattr(subject.model, "peft_config"):
        raise ValueError("There is no adapter to remove: the model is not a PeftModel.")
    return subject.probability(data.forget, adapter="base")
