from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES, forward_kl
from hf_transfer_ext.losses.fused import fused_divergence
from hf_transfer_ext.losses.fused_spans import SpansLoss
from hf_transfer_ext.losses.rows import DenseRows, HeadRows
from hf_transfer_ext.models.heads import LMHead
from hf_transfer_ext.registry import unknown_name

#: Ways to find what each token is on the other side.
ALIGNMENTS = ("attention", "exact")
#: Tokens whose distributions are looked at at once, to find the teacher's likeliest token.
FEW = 64


@dataclass(frozen=True)
class SpaceSide:
    """One model's view of the same spans of text, row by row: a row is a position that predicts a token of a span.

    Args:
        states: What the model's head reads; carries the gradient on the student's side.
        head: The model's head.
        read: Input embeddings of the tokens at the positions.
        written: Input embeddings of the tokens that are predicted.
        targets: The tokens that are predicted.
        sizes: Rows of each span, >= 1.
    """

    states: Float[Tensor, "rows width"]
    head: LMHead
    read: Float[Tensor, "rows embedding"]
    written: Float[Tensor, "rows embedding"]
    targets: Int[Tensor, " rows"]
    sizes: Int[Tensor, " spans"]


def dskd(
    student: SpaceSide,
    teacher: SpaceSide,
    texts: Int[Tensor, " spans"],
    student_ids: Int[Tensor, " matched"],
    teacher_ids: Int[Tensor, " matched"],
    projections: Mapping[str, Tensor],
    weight: float | Float[Tensor, ""] = 1.0,
    temperature: float = 1.0,
    *,
    alignment: str = "attention",
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Any] | None = None,
) -> SpansLoss:
    r"""Dual-space distillation: both models' hidden states in one space, through one head, in either space.

    .. math:: L = \sum_{i} \big[ CE(q^{T \to S}_i, y_i) + c_i \, D(sg \, q^{T \to S}_i, q_i) \big]
                  + \sum_{j} KL(p_j \| p^{S \to T}_j)

    over the student's tokens i and the teacher's tokens j, with
    :math:`q = \mathrm{softmax}(W_S h^S)`, :math:`q^{T \to S} = \mathrm{softmax}(W_S h^{T \to S})`,
    :math:`p = \mathrm{softmax}(W_T h^T)` and :math:`p^{S \to T} = \mathrm{softmax}(W_T h^{S \to T})`. The heads W do
    not learn from the projected states. :math:`c_i` is 1 where the projected teacher's likeliest token is
    :math:`y_i`, else 0: a projection that is not good yet does not teach.

    `alignment: attention` is cross-model attention, for any two tokenizations: with embeddings e of the token that is
    read and of the one that is predicted (in square brackets, side by side), each in units of its standard deviation
    on the teacher's side,

    .. math:: a = \frac{P_q [e^S_i; e^S_{i+1}] \cdot [e^T_j; e^T_{j+1}]}{\sqrt{2 d_T}}, \quad
              h^{T \to S}_i = \sum_j \mathrm{softmax}_j(a) P_{TS} (h^T_j + e^T_{j+1}), \quad
              h^{S \to T}_j = \sum_i \mathrm{softmax}_i(a) P_{ST} h^S_i

    and :math:`y_i` is the token of the text. `alignment: exact` (the second version of the paper) compares the spans
    that are one token on both sides, with :math:`h^{T \to S} = P_{TS} h^T` and :math:`h^{S \to T} = P_{ST} h^S`;
    :math:`y_i` is the teacher's likeliest token there, and a token whose label the student's vocabulary lacks is left
    out. D stands for the KL in the teacher's space, too. It needs no labels of the data, which is why it also serves
    texts that the student wrote.

    When to use it: a teacher with another tokenizer whose hidden states are at hand, and a student that profits from
    more than the teacher's probabilities; `exact` where the vocabularies share most tokens and for `on_policy`,
    `attention` elsewhere. `gold` needs no parameters and no hidden states.

    Deviations: standard deviations are those of one text, so that the loss of a text does not depend on the batch.
    With `exact`, every part is a sum over its tokens (the paper takes the mean of each), and the student's projection
    is trained from the start that the paper computes anew in each step.

    Args:
        texts: The text of each span, increasing; tokens of one text are compared with each other.
        student_ids: Tokens that both vocabularies have, in the student's vocabulary.
        teacher_ids: The same tokens in the teacher's.
        projections: `query` :math:`P_q` for attention, `to_student` :math:`P_{TS}`, `to_teacher` :math:`P_{ST}`.
        weight: Factor of the loss of each token.
        temperature: > 0, divides the logits in D and in the KL.
        alignment: "attention" or "exact".
        divergence: D, a name of `DISTILLATION_LOSSES`.
        divergence_options: Options of D.

    Returns:
        The sum, and its parts without weight, in nats: for each of the student's tokens, then of the teacher's.

    Source: Dual-Space Knowledge Distillation for Large Language Models, Zhang et al. 2024,
    https://arxiv.org/abs/2406.17328; `exact`: A Dual-Space Framework for General Knowledge Distillation of Large
    Language Models, Zhang et al. 2025, https://arxiv.org/abs/2504.11426
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(unknown_name("alignment of dskd", alignment, ALIGNMENTS))
    chosen, options = DISTILLATION_LOSSES[divergence], dict(divergence_options or {})
    labels = student.targets
    if alignment == "exact":
        student, teacher, labels = _one_token_spans(student, teacher, student_ids, teacher_ids)
        in_student = teacher.states.float() @ projections["to_student"].T
        in_teacher = student.states.float() @ projections["to_teacher"].T
    else:
        in_student, in_teacher = _attended(student, teacher, texts, projections)
    frozen, one = student.head.detach(), torch.as_tensor(weight)
    own, other = (one.to(side.states.device).float().expand(len(side.states)) for side in (student, teacher))
    projected = fused_divergence(
        in_student, frozen, None, chosen, weights=own, labels=labels, kd_weight=0.0, ce_weight=1.0, statistics=True
    )
    assert projected.statistics is not None
    agrees = projected.statistics.correct
    in_space = fused_divergence(
        student.states, student.head, HeadRows(in_student, frozen), chosen, weights=own * agrees,
        temperature=temperature, **options,
    )  # fmt: skip
    theirs = teacher.head.detach()
    back, more = (forward_kl, {}) if alignment == "attention" else (chosen, options)
    in_other = fused_divergence(
        in_teacher, theirs, HeadRows(teacher.states, theirs), back, weights=other, temperature=temperature, **more
    )
    values = [projected.cross_entropy + agrees * in_space.divergence, in_other.divergence]
    return SpansLoss(projected.loss + in_space.loss + in_other.loss, torch.cat(values))


def _attended(
    student: SpaceSide, teacher: SpaceSide, texts: Tensor, projections: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The teacher's states at the student's tokens in the student's space, and the other way round."""
    query, to_student, to_teacher = (projections[name] for name in ("query", "to_student", "to_teacher"))
    found = [[student.states[:0].float() @ to_teacher.T @ to_student.T], [student.states[:0].float() @ to_teacher.T]]
    for own, other in _rows_by_text(student, teacher, texts):
        read, written, states = (one[other].float() for one in (teacher.read, teacher.written, teacher.states))
        index = torch.cat([read, written], -1)
        asked = torch.cat([student.read[own], student.written[own]], -1).float() @ query.T
        scores = asked @ (index / _deviation(index)).T / index.shape[-1] ** 0.5
        values = (states / _deviation(states) + written / _deviation(written)) @ to_student.T
        found[0].append(scores.softmax(-1) @ values)
        found[1].append(scores.T.softmax(-1) @ (student.states[own].float() @ to_teacher.T))
    return torch.cat(found[0]), torch.cat(found[1])


def _rows_by_text(student: SpaceSide, teacher: SpaceSide, texts: Tensor) -> list[tuple[slice, slice]]:
    """The rows of each text on both sides."""
    counts = torch.unique_consecutive(texts, return_counts=True)[1].tolist()
    found, starts = [], (0, 0)
    for own, other in zip(student.sizes.split(counts), teacher.sizes.split(counts), strict=True):
        ends = starts[0] + int(own.sum()), starts[1] + int(other.sum())
        found.append((slice(starts[0], ends[0]), slice(starts[1], ends[1])))
        starts = ends
    return found


def _deviation(values: Tensor) -> Tensor:
    return values.std(correction=0).clamp(min=torch.finfo(values.dtype).tiny)


def _one_token_spans(
    student: SpaceSide, teacher: SpaceSide, student_ids: Tensor, teacher_ids: Tensor
) -> tuple[SpaceSide, SpaceSide, Tensor]:
    """The rows of spans of one token on both sides, and the teacher's likeliest tokens in the student's vocabulary.

    Rows where the student's vocabulary lacks that token are left out.
    """
    single = (student.sizes == 1) & (teacher.sizes == 1).to(student.sizes.device)
    own, other = ((side.sizes.cumsum(0) - 1)[single.to(side.sizes.device)] for side in (student, teacher))
    likeliest = _likeliest(HeadRows(teacher.states[other], teacher.head)).to(student_ids.device)
    spelled = torch.full((teacher.head.vocab_size,), -1, dtype=torch.long, device=student_ids.device)
    spelled[teacher_ids] = student_ids
    labels = spelled[likeliest]
    there = labels >= 0
    return _picked(student, own[there.to(own.device)]), _picked(teacher, other[there.to(other.device)]), labels[there]


def _picked(side: SpaceSide, rows: Tensor) -> SpaceSide:
    parts = (side.read[rows], side.written[rows], side.targets[rows])
    return SpaceSide(side.states[rows], side.head, *parts, torch.ones_like(rows))


def _likeliest(rows: DenseRows) -> Int[Tensor, " rows"]:
    read, found = rows.reader(), [torch.zeros(0, dtype=torch.long)]
    for start in range(0, len(rows), FEW):
        block: Any = read(slice(start, min(start + FEW, len(rows))))
        found.append(block.argmax(-1).cpu())  # what is left to do to logits keeps their order
    return torch.cat(found)


def start_of_projection(
    from_head: Float[Tensor, "from_vocab from_width"],
    to_head: Float[Tensor, "to_vocab to_width"],
    from_ids: Int[Tensor, " matched"],
    to_ids: Int[Tensor, " matched"],
) -> Float[Tensor, "to_width from_width"]:
    r"""The projection after which the other head gives the matched tokens the logits that they had before.

    .. math:: P = \arg\min_P \sum_v | W'_v P - W_v |^2 = W'^{+} W

    over the matched tokens v, by least squares; a small ridge stands in for tokens that are too few.

    Source: A Dual-Space Framework for General Knowledge Distillation of Large Language Models, Zhang et al. 2025,
    https://arxiv.org/abs/2504.11426
    """
    source, target = from_head[from_ids].double(), to_head[to_ids].double()
    gram = target.T @ target
    ridge = 1e-6 * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * eye, target.T @ source).float()
