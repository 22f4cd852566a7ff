from __future__ import annotations

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values


def use_of_context(found: Values, original: Values) -> str:
    return f"as use of information in the prompt: {found.mean():.2f}, the original {original.mean():.2f}"


@attack(needs_floor=True, second_reading=use_of_context)
def in_context(subject: Subject, data: AuditData) -> Values:
    """State the fact in the prompt, in the words of the paraphrased answer, and ask for it.

    A high score has two interpretations: a prompt can bring the knowledge back, and the model can still use
    information in its prompt. A model that never saw the data also scores high, so the score is compared with such a
    model and is not evidence of recovery by itself.

    Source: Shumailov et al., "UnUnlearning: unlearning is not sufficient for content regulation in advanced
    generative AI", 2024, https://arxiv.org/abs/2407.00106
    """
    rows = [
        {**row, "question": f"{row.get('paraphrased_answer') or row['answer']} {row['question']}"}
        for row in data.forget
    ]
    return subject.probability(rows)
