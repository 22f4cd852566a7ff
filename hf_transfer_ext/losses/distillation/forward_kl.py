from __future__ import annotations

from hf_transfer_ext.losses.slopes import ALL_FORMS, Outcomes, PerRow, Rows, fused_by, weighted, weighted_sum
from hf_transfer_ext.tensors import Logits, PerToken


def slope(student: Outcomes, teacher: Outcomes) -> tuple[PerRow, Rows]:
    return weighted_sum(teacher.probs, teacher.log - student.log), -teacher.probs


@fused_by(slope, forms=ALL_FORMS)
def forward_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0) -> PerToken:
    r"""KL(teacher || student) for each token, summed over the vocabulary: the student covers the teacher.

    .. math:: \sum_v p_v (\log p_v - \log q_v), \quad q = \text{student}, p = \text{teacher}

    When to use it: first, on fixed data: it works with every kind of teacher, caches, other tokenizers' groups and
    mixtures of models and caches included. A student that is too small for all of its teacher spreads out and may
    write unlikely text.

    Args:
        temperature: > 0, divides both logits. The result is *not* multiplied by temperature**2.

    Returns:
        Nats per token, >= 0, and 0 where both models agree; inf where the student excludes what the teacher allows.
        Nothing is masked.

    Source: Distilling the Knowledge in a Neural Network, Hinton et al. 2015, https://arxiv.org/abs/1503.02531
    """
    log_q = (student_logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    return weighted(log_p.exp(), log_p - log_q).sum(-1)
