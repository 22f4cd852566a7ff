from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.distillation.generalized_jsd import generalized_jsd
from hf_transfer_ext.losses.span_pair import SpanPair
from hf_transfer_ext.losses.spans.uld import sorted_distance


def gold(
    pair: SpanPair,
    student_ids: Int[Tensor, " student_matched"],
    teacher_ids: Int[Tensor, " teacher_matched"],
    *,
    matched_weight: float | None = 0.5,
    beta: float = 0.5,
) -> Float[Tensor, " spans"]:
    r"""A divergence over the tokens that both vocabularies have, and the sorted distance of all others.

    .. math:: w \, \mathrm{JSD}_\beta(Q, P) + (1 - w) \sum_i | \mathrm{sort}(q_{rest})_i - \mathrm{sort}(p_{rest})_i |

    Q and P are the merged distributions over the matched tokens and one bucket for the rest, so that they sum to 1 and
    the divergence is never negative; the published code takes the divergence of the matched tokens alone.

    When to use it: the vocabularies share a good part of their tokens (`teachers.alignment.align_vocabularies` shows
    how many); the first choice across tokenizers.

    Args:
        student_ids: Matched tokens in the student's vocabulary.
        teacher_ids: The same tokens in the teacher's.
        matched_weight: w in [0, 1]; None for the share of the teacher's vocabulary that is matched, as TRL has it
            by default.
        beta: Of `generalized_jsd`.

    Returns:
        For each span, >= 0.

    Source: GOLD of TRL, Patiño et al. 2025, https://huggingface.co/docs/trl/gold_trainer
    """
    if matched_weight is None:
        matched_weight = len(teacher_ids) / pair.teacher.shape[1]
    if len(student_ids) != len(teacher_ids) or not 0 <= matched_weight <= 1:
        raise ValueError(
            "`student_ids` and `teacher_ids` have to be as many and `matched_weight` in [0, 1], got "
            f"{len(student_ids)}, {len(teacher_ids)} and {matched_weight}."
        )
    q, rest_of_q = _split(pair.student, student_ids)
    p, rest_of_p = _split(pair.teacher, teacher_ids)
    matched = generalized_jsd(q[None], p[None], beta=beta)[0]
    return matched_weight * matched + (1 - matched_weight) * sorted_distance(rest_of_q, rest_of_p)


def _split(merged: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the matched tokens and of the bucket for the rest; probabilities of the other tokens."""
    others = torch.ones(merged.shape[1], dtype=torch.bool, device=merged.device)
    others[ids] = False
    listed = merged[:, ids]
    bucket = (1 - listed.exp().sum(1, keepdim=True)).clamp(min=torch.finfo(merged.dtype).tiny).log()
    return torch.cat([listed, bucket], 1), merged[:, others].exp()
