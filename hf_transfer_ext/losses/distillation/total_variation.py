from __future__ import annotations

from hf_transfer_ext.losses.slopes import SUM_FORMS, Outcomes, PerRow, Rows, fused_by
from hf_transfer_ext.tensors import Logits, PerToken


def slope(student: Outcomes, teacher: Outcomes) -> tuple[PerRow, Rows]:
    difference = student.probs - teacher.probs
    return 0.5 * difference.abs().sum(-1), difference.sign_().mul_(student.probs).mul_(0.5)


@fused_by(slope, forms=SUM_FORMS)
def total_variation(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0) -> PerToken:
    r"""Total variation distance for each token, half the L1 distance of the two distributions; symmetric.

    .. math:: \tfrac{1}{2} \sum_v |p_v - q_v|, \quad q = \text{student}, p = \text{teacher}

    When to use it: where labels or teacher are noisy: each token counts at most 1, however wrong it is. It learns
    slowly from a weak student, since its gradient ignores how small a probability is.

    Args:
        temperature: > 0, divides both logits. The result is *not* multiplied by temperature**2.

    Returns:
        A share between 0 (both models agree) and 1 (disjoint); no nats. The gradient is 0 where p = q. Nothing is
        masked.

    Source: f-Distill, Wen et al. 2023, equation 9, https://arxiv.org/abs/2307.15190
    """
    q = (student_logits.float() / temperature).softmax(-1)
    p = (teacher_logits.float() / temperature).softmax(-1)
    return 0.5 * (p - q).abs().sum(-1)
