from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.slopes import Outcomes, PerRow, Rows, fused_by, weighted, weighted_rows
from hf_transfer_ext.tensors import Logits, PerToken


def head_share(
    q: Float[Tensor, "*shape vocab"], p: Float[Tensor, "*shape vocab"], head_mass: float
) -> Float[Tensor, "*shape"]:
    """The share of |p - q| that lies in the teacher's head; .5 where both agree everywhere.

    A token is in the head if the tokens that the teacher holds for likelier have less than `head_mass` together. Only
    as many of the largest p are sorted as the head needs.
    """
    kept, vocab = 64, p.shape[-1]
    top = p.topk(min(kept, vocab))
    while kept < vocab and ((missing := head_mass - top.values.sum(-1)) > 0).any():
        # Every further token is at most as likely as the last one kept: that many more are needed at least.
        needed = (missing / top.values[..., -1]).nan_to_num().max().clamp(max=vocab)
        kept = max(4 * kept, kept + 2 * int(needed))
        top = p.topk(min(kept, vocab))
    likelier = top.values.cumsum(-1) - top.values
    gap = (p - q).abs()
    head_gap = (gap.gather(-1, top.indices) * (likelier < head_mass)).sum(-1)
    total = gap.sum(-1)
    return torch.where(total > 0, head_gap / total, 0.5)


def slope(student: Outcomes, teacher: Outcomes, *, head_mass: float = 0.5) -> tuple[PerRow, Rows]:
    q, p = student.probs, teacher.probs
    share = head_share(q, p, head_mass)[:, None]
    s = weighted_rows(q, student.log - teacher.log) * (1 - share)
    value = (share * weighted_rows(p, teacher.log - student.log)).sum(-1) + s.sum(-1)
    return value, s.addcmul_(share, p, value=-1.0)


@fused_by(slope)
def adaptive_kl(
    student_logits: Logits, teacher_logits: Logits, *, head_mass: float = 0.5, temperature: float = 1.0
) -> PerToken:
    r"""Forward KL for what the student misses of the teacher's head, reverse KL for the tail, mixed for each token.

    .. math:: \frac{g_{head}}{g} KL(p \| q) + \frac{g_{tail}}{g} KL(q \| p), \quad g = \sum_v |p_v - q_v|,
              \quad q = \text{student}, p = \text{teacher}

    The weights are constants of the gradient, as in the authors' code. The head is the smallest set of likeliest
    tokens that holds `head_mass`, as the paper defines it; the code that circulates leaves out the token that crosses
    the mass, and gives NaN where both models agree everywhere.

    When to use it: where neither KL is clearly better, at about the price of both.

    Args:
        head_mass: Probability that the teacher's head holds at least, in (0, 1].
        temperature: > 0, divides both logits. The result is *not* multiplied by temperature**2.

    Returns:
        Nats per token, >= 0, and 0 where both models agree. Nothing is masked.

    Raises:
        ValueError: `head_mass` is not in (0, 1].

    Source: Rethinking KL Divergence in KD for LLMs (AKL), Wu et al. 2024, https://arxiv.org/abs/2404.02657
    """
    if not 0 < head_mass <= 1:
        raise ValueError(f"`head_mass` has to lie in (0, 1], got {head_mass}.")
    log_q = (student_logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    share = head_share(q.detach(), p.detach(), head_mass)
    return share * weighted(p, log_p - log_q).sum(-1) + (1 - share) * weighted(q, log_q - log_p).sum(-1)
