"""The loss of a training with teachers of other tokenizers: of each teacher's spans, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_transfer_ext.losses.fused_spans import SpansLoss, fused_spans
from hf_transfer_ext.losses.spans import SPAN_LOSSES, has_projections, takes_vocabularies
from hf_transfer_ext.models.heads import LMHead, head_of
from hf_transfer_ext.models.layer_views import FEATURES
from hf_transfer_ext.teachers.several import TaughtSpans, single_teachers, taught_spans
from hf_transfer_ext.teachers.spans import SpanTeacher
from hf_transfer_ext.tensors import Mask
from hf_transfer_ext.trainers.dual_space import DualSpace


def span_teachers(teacher: Any) -> dict[str, SpanTeacher]:
    """The teachers with tokens of their own, by name; none where the teacher gives rows of the student's tokens."""
    found = {} if teacher is None else single_teachers({"teacher": teacher})
    return {name: one for name, one in found.items() if isinstance(one, SpanTeacher)}


class SpanLosses:
    r"""The span loss of one teacher, or of several:

    .. math:: \sum_i s_i L_i

    where :math:`L_i` is the loss of the spans of teacher i, summed over the texts that it teaches. The shares s are
    the normalized weights of the teachers, the same for each text (`teachers_by: weight`), or 1 for the teacher that a
    row names (`column`). No distribution is mixed: teachers with other tokens have no common vocabulary and no common
    spans. A teacher with the student's own tokenizer is no exception: it reads the text tokenized anew, and its spans
    are single tokens.

    Args:
        args: `DistillationConfig`.
        student: The student, unwrapped.
        teacher: A `SpanTeacher`, or `MixedTeachers` or `RoutedTeachers` of several.

    Raises:
        ValueError: The loss needs projections that a model does not allow.
    """

    def __init__(self, args: Any, student: nn.Module, teacher: Any) -> None:
        self.teacher, self.loss, self.options = teacher, SPAN_LOSSES[args.loss], dict(args.loss_options)
        self.kd_weight, self.temperature = args.kd_weight, args.distill_temperature
        #: By teacher; empty where the loss has no projections.
        self.dual_spaces: dict[str, DualSpace] = {}
        if has_projections(self.loss):
            for place, (name, one) in enumerate(span_teachers(teacher).items()):
                self.dual_spaces[name] = DualSpace(self.loss, self.options, student, one, args.seed + place)

    def spans(self, student: nn.Module, inputs: dict[str, Any], mask: Mask) -> list[TaughtSpans]:
        """What each teacher says about the labeled spans of a batch."""
        return taught_spans(self.teacher, student, inputs, mask)

    def student_viewed(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The layers of the student that the loss reads, while it runs; None where it reads none."""
        some = next(iter(self.dual_spaces.values()), None)
        return nullcontext(None) if some is None else some.student_viewed(model)

    def __call__(
        self,
        model: nn.Module,
        states: Tensor,
        layers: Mapping[int, Any] | None,
        head: LMHead | None,
        taught: Sequence[TaughtSpans],
        inputs: Mapping[str, Any],
        weight: Tensor,
    ) -> SpansLoss:
        """The loss of the spans of a batch.

        Args:
            model: The student.
            states: `(batch, length, width)`, what its head reads; logits where `head` is None.
            layers: What `student_viewed` gives.
            weight: Of each token.

        Returns:
            The sum over all spans with weight, share and `kd_weight`; and their values, times the share alone.
        """
        losses, values = [states.new_zeros((), dtype=torch.float32)], [states.new_zeros(0, dtype=torch.float32)]
        for one in taught:
            factor = self.kd_weight * one.share * weight
            if layers is not None:
                read, space = layers[FEATURES].states, self.dual_spaces[one.name]
                found = space(model, read, head or head_of(model), one.signal, inputs, factor, self.temperature)
            else:
                found = self._fused(states, head, one, inputs, factor)
            losses.append(found.loss)
            values.append(one.share * found.values)
        return SpansLoss(torch.stack(losses).sum(), torch.cat(values))

    def _fused(
        self, states: Tensor, head: LMHead | None, one: TaughtSpans, inputs: Mapping[str, Any], factor: Tensor
    ) -> SpansLoss:
        spans, options = one.signal, dict(self.options)
        if takes_vocabularies(self.loss):
            own, other = (ids.to(states.device) for ids in one.teacher.matched)
            options |= {"student_ids": own, "teacher_ids": other}
        length = inputs["input_ids"].shape[1]
        rows = states[:, -length:].flatten(0, 1)[spans.places.to(states.device)]
        return fused_spans(
            rows, head, spans.student, spans.rows, spans.teacher, self.loss,
            weights=factor.expand(len(spans.student.sizes)), temperature=self.temperature, **options,
        )  # fmt: skip
