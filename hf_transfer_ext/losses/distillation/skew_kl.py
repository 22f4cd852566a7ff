from __future__ import annotations

import torch

from hf_transfer_ext.losses.slopes import SUM_FORMS, Outcomes, PerRow, Rows, fused_by, mixture, weighted, weighted_sum
from hf_transfer_ext.tensors import Logits, PerToken


def slope(student: Outcomes, teacher: Outcomes, *, skew: float = 0.1) -> tuple[PerRow, Rows]:
    q, p = student.probs, teacher.probs
    m = mixture(skew, p, q)
    s = torch.where(q > 0, p * q / m, 0.0).mul_(skew - 1)
    return weighted_sum(p, teacher.log - m.log()), s


@fused_by(slope, forms=SUM_FORMS)
def skew_kl(
    student_logits: Logits, teacher_logits: Logits, *, skew: float = 0.1, temperature: float = 1.0
) -> PerToken:
    r"""KL(teacher || mixture) for each token: forward KL that stays finite where the student has no mass.

    .. math:: KL(p \| m), \quad m = \lambda p + (1 - \lambda) q, \quad q = \text{student}, p = \text{teacher}

    When to use it: as `forward_kl`, where gradients of a weak student or a peaked teacher are too large; on the
    teacher's texts in `distillm_2`.

    Args:
        skew: :math:`\lambda`, the teacher's share of the mixture, in [0, 1). 0 is `forward_kl`.
        temperature: > 0, divides both logits. The result is *not* multiplied by temperature**2.

    Returns:
        Nats per token, between 0 (both models agree) and -log(skew). Nothing is masked.

    Raises:
        ValueError: `skew` is not in [0, 1).

    Source: DistiLLM, Ko et al. 2024, section 3.1, https://arxiv.org/abs/2402.03898
    """
    if not 0 <= skew < 1:
        raise ValueError(f"`skew` has to lie in [0, 1), got {skew}. At 1 the student has no part in the loss.")
    log_q = (student_logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    p = log_p.exp()
    return weighted(p, log_p - mixture(skew, p, log_q.exp()).log()).sum(-1)
