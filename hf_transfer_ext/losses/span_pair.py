"""What a student and a teacher with different tokenizers say about the same spans of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

Groups = Sequence[tuple[int, int]]
Loss = TypeVar("Loss", bound=Callable)

#: Span losses that read likelihoods alone; `reads_likelihoods` adds to them.
_OF_LIKELIHOODS: set[Callable] = set()


@dataclass(frozen=True)
class SpanPair:
    r"""The predictions for spans of a text that are groups of tokens on both sides.

    A group of tokens a, ..., b - 1 is predicted at positions a - 1, ..., b - 2. Its *merged distribution* is that of
    its last token together with the tokens before it as they are in the text,

    .. math:: p(v) = p(x_{b-1} = v \mid x_{<b-1}) \prod_{i=a}^{b-2} p(x_i \mid x_{<i}),

    which sums to less than 1 where a group has several tokens: the rest is the mass of other beginnings.

    Args:
        student: Logarithm of the merged distribution over the student's vocabulary; carries the gradient.
        teacher: The same over the teacher's.
        student_spans: Logarithm of the probability that the student gives to the span as it is in the text.
        teacher_spans: The same of the teacher.
    """

    student: Float[Tensor, "spans student_vocab"]
    teacher: Float[Tensor, "spans teacher_vocab"]
    student_spans: Float[Tensor, " spans"]
    teacher_spans: Float[Tensor, " spans"]


def reads_likelihoods(loss: Loss) -> Loss:
    """Decorator of a span loss that reads `student_spans` and `teacher_spans` alone: a server can teach by it."""
    _OF_LIKELIHOODS.add(loss)
    return loss


def needs_likelihoods_alone(loss: Callable) -> bool:
    """Whether a span loss reads nothing of the teacher but the likelihoods of spans."""
    return loss in _OF_LIKELIHOODS


def span_pair(
    student_logits: Float[Tensor, "student_length student_vocab"],
    student_ids: Int[Tensor, " student_length"],
    student_groups: Groups,
    teacher_logits: Float[Tensor, "teacher_length teacher_vocab"],
    teacher_ids: Int[Tensor, " teacher_length"],
    teacher_groups: Groups,
    *,
    temperature: float = 1.0,
) -> SpanPair:
    """The predictions of both models for the spans of one text.

    A span with a group that starts with the first token of its side is left out: nothing predicts that token, where
    one side has no BOS.

    Args:
        student_groups: (first, last + 1) token of each span, as `teachers.alignment.align` gives them.
        teacher_groups: The same on the teacher's side, as many.
        temperature: > 0, divides the logits of both.

    Raises:
        ValueError: The groups are not as many on both sides, or reach beyond the tokens.
    """
    if len(student_groups) != len(teacher_groups) or not temperature > 0:
        raise ValueError(
            "Spans need one group on each side and a temperature > 0, got "
            f"{len(student_groups)} groups of the student, {len(teacher_groups)} of the teacher, and {temperature}."
        )
    kept = [i for i in range(len(student_groups)) if student_groups[i][0] > 0 and teacher_groups[i][0] > 0]
    student = _merged(student_logits, student_ids, [student_groups[i] for i in kept], temperature)
    with torch.no_grad():
        teacher = _merged(teacher_logits, teacher_ids, [teacher_groups[i] for i in kept], temperature)
    return SpanPair(student[0], teacher[0], student[1], teacher[1])


def _merged(logits: Tensor, ids: Tensor, groups: Groups, temperature: float) -> tuple[Tensor, Tensor]:
    """(merged distribution, probability of the whole span) of each group, as logarithms."""
    for first, end in groups:
        if not first < end <= len(ids):
            raise ValueError(f"A group of tokens {first} to {end} does not lie within the {len(ids)} tokens.")
    rows = [row for first, end in groups for row in range(first - 1, end - 1)]
    predicting = torch.tensor(rows, dtype=torch.long, device=ids.device)
    sizes = torch.tensor([end - first for first, end in groups], dtype=torch.long, device=ids.device)
    return merged_predictions(logits[predicting], ids[predicting + 1], sizes, temperature=temperature)


def merged_predictions(
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    sizes: Int[Tensor, " spans"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "spans vocab"], Float[Tensor, " spans"]]:
    """The merged distribution of each span, and the probability of the span as it is in the text, as logarithms.

    Args:
        logits: At the positions that predict the tokens of the spans, span after span.
        targets: The token that each of these positions predicts.
        sizes: Tokens of each span, >= 1.
    """
    log_probs = (logits.float() / temperature).log_softmax(-1)
    realized = log_probs.gather(1, targets[:, None])[:, 0]
    sums = torch.cat([realized.new_zeros(1), realized.cumsum(0)])
    ends = sizes.cumsum(0)
    before = sums[ends - sizes]
    return log_probs[ends - 1] + (sums[ends - 1] - before)[:, None], sums[ends] - before
