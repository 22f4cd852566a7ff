from __future__ import annotations

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


@attack(yardstick=None, needs_floor=True)
def multiple_choice(subject: Subject, data: AuditData) -> Values:
    """Probability of the correct answer relative to the wrong ones.

    A model that does not generate the answer may still prefer it. The choices differ only in the value within the same
    sentence. A model that never saw the data may prefer an answer for its form, so a floor is required.

    Raises:
        ValueError: A row has no wrong answers (`perturbed_answer`).

    Source: Jin et al., "RWKU", 2024 (multiple choice), https://arxiv.org/abs/2406.10890
    """
    if not all(row.get("perturbed_answer") for row in data.forget):
        raise ValueError("Multiple choice needs wrong answers: a column `perturbed_answer` in each row.")
    rows = [{**row, "answer": row.get("paraphrased_answer") or row["answer"]} for row in data.forget]
    return subject.metric_values(rows, ["choice_probability"])["choice_probability"]
