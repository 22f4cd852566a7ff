from __future__ import annotations

from dataclasses import replace

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


@attack(access="weights", floor_attack="plain_question")
def prompt_removal(subject: Subject, data: AuditData) -> Values:
    """Ask without the examples that come before each question: anyone who runs the model writes its prompt.

    Raises:
        ValueError: The model is asked without such examples, so there are none to leave out.

    Source: this package's own check; it only needs the published files.
    """
    if not subject.template.examples:
        raise ValueError("There is no prompt to remove: the model is asked without examples before the question.")
    return subject.probability(data.forget, template=replace(subject.template, examples=()))
