from __future__ import annotations

from hf_transfer_ext.losses.slopes import (
    SUM_FORMS,
    Outcomes,
    PerRow,
    Rows,
    fused_by,
    mixture,
    weighted,
    weighted_rows,
    weighted_sum,
)
from hf_transfer_ext.tensors import Logits, PerToken


def slope(student: Outcomes, teacher: Outcomes, *, beta: float = 0.5) -> tuple[PerRow, Rows]:
    q, p = student.probs, teacher.probs
    log_m = mixture(beta, p, q).log()
    s = weighted_rows(q, student.log - log_m).mul_(1 - beta)
    return beta * weighted_sum(p, teacher.log - log_m) + s.sum(-1), s


@fused_by(slope, forms=SUM_FORMS)
def generalized_jsd(
    student_logits: Logits, teacher_logits: Logits, *, beta: float = 0.5, temperature: float = 1.0
) -> PerToken:
    r"""Generalized Jensen-Shannon divergence for each token, summed over the vocabulary.

    .. math:: \beta\, KL(p \| m) + (1 - \beta)\, KL(q \| m), \quad m = \beta p + (1 - \beta) q,
              \quad q = \text{student}, p = \text{teacher}

    When to use it: between the two, on a mixture of data and the student's own texts, as GKD does; it is bounded,
    so single tokens never dominate.

    Args:
        beta: The teacher's share of the mixture, strictly between 0 and 1. Divided by beta the value tends to
            `forward_kl` as beta -> 0, and divided by 1 - beta to `reverse_kl` as beta -> 1: use these instead of the
            ends, where the divergence itself vanishes.
        temperature: > 0, divides both logits. The result is *not* multiplied by temperature**2.

    Returns:
        Nats per token, between 0 (both models agree) and the entropy of (beta, 1 - beta), log 2 at beta = .5. Nothing
        is masked.

    Raises:
        ValueError: `beta` is not strictly between 0 and 1.

    Source: GKD, Agarwal et al. 2024, equation 1, https://arxiv.org/abs/2306.13649
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"`beta` has to lie between 0 and 1, got {beta}. Its ends are forward_kl (0), reverse_kl (1)."
        )
    log_q = (student_logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    log_m = mixture(beta, p, q).log()
    return beta * weighted(p, log_p - log_m).sum(-1) + (1 - beta) * weighted(q, log_q - log_m).sum(-1)
