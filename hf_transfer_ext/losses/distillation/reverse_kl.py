from __future__ import annotations

from hf_transfer_ext.losses.slopes import SUM_FORMS, Outcomes, PerRow, Rows, fused_by, weighted, weighted_rows
from hf_transfer_ext.tensors import Logits, PerToken


def slope(student: Outcomes, teacher: Outcomes) -> tuple[PerRow, Rows]:
    s = weighted_rows(student.probs, student.log - teacher.log)  # + q, which the rule cancels
    return s.sum(-1), s


@fused_by(slope, forms=SUM_FORMS)
def reverse_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0) -> PerToken:
    r"""KL(student || teacher) for each token, summed over the vocabulary: the student keeps within the teacher.

    .. math:: \sum_v q_v (\log q_v - \log p_v), \quad q = \text{student}, p = \text{teacher}

    When to use it: on texts that the student writes (`on_policy`), where a small student should rather be right in
    some ways than cover all. On fixed data it starts slowly from a weak student.

    Args:
        temperature: > 0, divides both logits. The result is *not* multiplied by temperature**2.

    Returns:
        Nats per token, >= 0, and 0 where both models agree; inf where the teacher excludes what the student allows.
        Nothing is masked.

    Source: MiniLLM, Gu et al. 2024, https://arxiv.org/abs/2306.08543
    """
    log_q = (student_logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    return weighted(log_q.exp(), log_q - log_p).sum(-1)
