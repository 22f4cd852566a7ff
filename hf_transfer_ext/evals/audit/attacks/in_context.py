from __future__ import annotations

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


def use_of_context(found: Values, original: Values) -> str:
    return f"read as use of what the prompt says: {found.mean():.2f}, the original {original.mean():.2f}"


@attack(needs_floor=True, second_reading=use_of_context)
def in_context(subject: Subject, data: AuditData) -> Values:
    """Tell the fact in the prompt, in the words of the paraphrased answer, and ask for it.

    A high score reads two ways: the knowledge can be brought back by a prompt, and the model can still use what it is
    told. A model that never knew scores high too, so it is compared with one and never counts as recovery by itself.

    Source: Shumailov et al., "UnUnlearning: unlearning is not sufficient for content regulation in advanced
    generative AI", 2024, https://arxiv.org/abs/2407.00106
    """
    rows = [
        {**row, "question": f"{row.get('paraphrased_answer') or row['answer']} {row['question']}"}
        for row in data.forget
    ]
    return subject.probability(rows)
