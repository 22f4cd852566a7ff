"""Span losses in little memory: logits of both models exist for a few spans at a time, and gradients at once.

What `losses.fused` is for token divergences. A span loss sorts or merges whole distributions, so autograd
differentiates it, but within one chunk of spans: full logits of a batch are never built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.fused import (
    CHUNK_BYTES,
    CHUNK_BYTES_GPU,
    FLOAT16_GAIN,
    ChunkGradients,
    consumed,
)
from hf_transfer_ext.losses.rows import DenseRows, Projection
from hf_transfer_ext.losses.span_pair import SpanPair, merged_predictions
from hf_transfer_ext.models.heads import LMHead, LogitFinish

#: Tensors of the size of a chunk's logits that live at once while a span loss is differentiated.
COPIES = 9


@dataclass(frozen=True)
class SpanTokens:
    """The tokens of spans on one side, span after span.

    Args:
        targets: Their ids.
        sizes: Tokens of each span, >= 1.
    """

    targets: Int[Tensor, " rows"]
    sizes: Int[Tensor, " spans"]


class SpansLoss(NamedTuple):
    """loss: Sum over spans of weight * loss; carries the gradient. values: Of each span, without weight."""

    loss: Float[Tensor, ""]
    values: Float[Tensor, " spans"]


def fused_spans(
    student: Float[Tensor, "rows size"],
    head: LMHead | None,
    student_tokens: SpanTokens,
    teacher: DenseRows,
    teacher_tokens: SpanTokens,
    loss: Callable[..., Tensor],
    *,
    weights: Float[Tensor, " spans"],
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    **options: Any,
) -> SpansLoss:
    """Weighted sum of a span loss; gradients flow to hidden states, head weight and bias, or to logits.

    Gradients are computed in the forward pass and consumed by the first backward pass.

    Args:
        student: Hidden states at the positions that predict the student's tokens of the spans; logits with `head`
            None.
        head: The student's head.
        teacher: The teacher's rows at the positions that predict its tokens of the same spans.
        loss: `(pair, **options) -> (spans,)`, a loss of `losses.spans`.
        temperature: > 0, divides the logits of both.
        chunk_rows: Rows of either side whose logits exist at once, except for a longer span; by default as many as
            fit in `CHUNK_BYTES`.

    Raises:
        ValueError: The spans are not as many on both sides, or rows and tokens are not.
    """
    counts = {
        "student rows": (len(student), int(student_tokens.sizes.sum())),
        "teacher rows": (len(teacher), int(teacher_tokens.sizes.sum())),
        "spans": (len(student_tokens.sizes), len(teacher_tokens.sizes)),
    }
    for what, (found, needed) in counts.items():
        if found != needed:
            raise ValueError(
                f"Both sides of a span loss have to hold the same spans, got {found} and {needed} {what}."
            )
    vocab = head.vocab_size if head is not None else student.shape[1]
    if chunk_rows is None:
        room = CHUNK_BYTES.get(student.device.type, CHUNK_BYTES_GPU)
        chunk_rows = max(1, room // (4 * COPIES * max(vocab, teacher.vocab_size)))
    values = torch.zeros(len(weights), device=student.device)
    total = _FusedSpans.apply(
        student, None if head is None else head.weight, None if head is None else head.bias,
        LogitFinish() if head is None else head.finish, student_tokens, teacher, teacher_tokens,
        lambda pair: loss(pair, **options), weights.detach().float(), temperature, chunk_rows, values,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return SpansLoss(total, values)


class _FusedSpans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        finish: LogitFinish,
        student_tokens: SpanTokens,
        teacher: DenseRows,
        teacher_tokens: SpanTokens,
        loss: Callable[[SpanPair], Tensor],
        weights: Tensor,
        temperature: float,
        chunk_rows: int,
        values: Tensor,
        with_gradient: bool,
    ) -> Tensor:
        needs = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        projection = None if weight is None else Projection(student, LMHead(weight, bias))
        read = teacher.reader()
        largest = weights.abs().amax() if len(weights) else weights.new_ones(())
        dtype = student.dtype if projection is None else projection.dtype
        unit = largest * abs(finish.scale) / (FLOAT16_GAIN if dtype == torch.float16 else 1.0)
        unit = torch.where(unit > 0, unit, 1.0)
        gradients = ChunkGradients(needs, student, weight, bias)
        with torch.autocast(student.device.type, enabled=False):
            for spans, rows, teacher_rows in _chunks(student_tokens.sizes, teacher_tokens.sizes, chunk_rows):
                projected = student[rows] if projection is None else projection(rows)
                block: Any = read(teacher_rows)
                other = merged_predictions(
                    teacher.finish(block.float()), teacher_tokens.targets[teacher_rows].to(block.device),
                    teacher_tokens.sizes[spans].to(block.device), temperature=temperature,
                )  # fmt: skip
                with torch.enable_grad():
                    leaf = projected.detach().requires_grad_(any(needs))
                    own = merged_predictions(
                        finish(leaf.float()), student_tokens.targets[rows], student_tokens.sizes[spans],
                        temperature=temperature,
                    )  # fmt: skip
                    there = own[0].device
                    found = loss(SpanPair(own[0], other[0].to(there), own[1], other[1].to(there)))
                    values[spans] = found.detach().float()
                    if not any(needs):
                        continue
                    (d_logits,) = torch.autograd.grad((found * (weights[spans].to(there) / unit)).sum(), leaf)
                gradients.add(rows, d_logits.to(dtype), projection)
        ctx.unit, ctx.grads = unit, gradients.with_dtypes()
        return torch.where(weights != 0, weights * values, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*consumed(ctx, d_loss[0]), *[None] * 10)


def _chunks(student_sizes: Tensor, teacher_sizes: Tensor, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """(spans, the student's rows, the teacher's rows) of each chunk: whole spans, up to `rows` rows of either side."""
    sizes = list(zip(student_sizes.tolist(), teacher_sizes.tolist(), strict=True))
    start, first, own, other = 0, (0, 0), 0, 0
    for i, (one, two) in enumerate(sizes):
        if i > start and max(own + one - first[0], other + two - first[1]) > rows:
            yield slice(start, i), slice(first[0], own), slice(first[1], other)
            start, first = i, (own, other)
        own, other = own + one, other + two
    if sizes:
        yield slice(start, len(sizes)), slice(first[0], own), slice(first[1], other)
