from __future__ import annotations

import torch

from hf_transfer_ext.losses.slopes import SUM_FORMS, Outcomes, PerRow, Rows, fused_by, mixture, weighted, weighted_rows
from hf_transfer_ext.tensors import Logits, PerToken


def slope(student: Outcomes, teacher: Outcomes, *, skew: float = 0.1) -> tuple[PerRow, Rows]:
    q, p = student.probs, teacher.probs
    m = mixture(skew, q, p)
    s = weighted_rows(q, student.log - m.log())
    value = s.sum(-1)
    return value, s.sub_(torch.where(q > 0, q * q / m, 0.0), alpha=skew)


@fused_by(slope, forms=SUM_FORMS)
def skew_reverse_kl(
    student_logits: Logits, teacher_logits: Logits, *, skew: float = 0.1, temperature: float = 1.0
) -> PerToken:
    r"""KL(student || mixture) for each token: reverse KL that stays finite where the teacher has no mass.

    .. math:: KL(q \| m), \quad m = (1 - \lambda) p + \lambda q, \quad q = \text{student}, p = \text{teacher}

    When to use it: as `reverse_kl`, where the teacher gives almost no mass to what the student writes; on the
    student's texts in `distillm_2`.

    Args:
        skew: :math:`\lambda`, the student's share of the mixture, in [0, 1). 0 is `reverse_kl`.
        temperature: > 0, divides both logits. The result is *not* multiplied by temperature**2.

    Returns:
        Nats per token, between 0 (both models agree) and -log(skew). Nothing is masked.

    Raises:
        ValueError: `skew` is not in [0, 1).

    Source: DistiLLM, Ko et al. 2024, section 3.1, https://arxiv.org/abs/2402.03898
    """
    if not 0 <= skew < 1:
        raise ValueError(f"`skew` has to lie in [0, 1), got {skew}. At 1 the teacher has no part in the loss.")
    log_q = (student_logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    q = log_q.exp()
    return weighted(q, log_q - mixture(skew, q, log_p.exp()).log()).sum(-1)
