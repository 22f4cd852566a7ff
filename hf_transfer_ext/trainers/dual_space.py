"""Dual-space distillation in the trainer: its projections, and what it reads of both models.

The loss itself is a formula in `losses/spans/dskd.py`. Projections are trained along (`trainers.trained_along`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_transfer_ext.losses.fused_spans import SpansLoss
from hf_transfer_ext.losses.rows import HeadRows
from hf_transfer_ext.losses.spans.dskd import SpaceSide, start_of_projection
from hf_transfer_ext.models.heads import LMHead, causal_lm_of, head_module, is_plain_head
from hf_transfer_ext.models.layer_views import FEATURES, layers_viewed
from hf_transfer_ext.registry import keyword_options
from hf_transfer_ext.teachers.spans import SpanSignal, SpanTeacher
from hf_transfer_ext.trainers.trained_along import TrainedAlong


class DualSpace(TrainedAlong):
    """A span loss that compares hidden states in one space (`dskd`), with its projections.

    Args:
        loss: The loss, with an argument `projections`.
        options: Its own options.
        student: The student, unwrapped.
        teacher: The teacher with its tokens.
        seed: Of the projections' start, which is the same on all processes.

    Raises:
        ValueError: A head is adapted or quantized, or embeddings have another width than hidden states.
    """

    def __init__(
        self, loss: Callable[..., Any], options: Mapping[str, Any], student: nn.Module, teacher: SpanTeacher, seed: int
    ) -> None:
        super().__init__("loss", "Choose gold, uld or alm, or plain DDP.")
        self.loss, self.options = loss, dict(options)
        if teacher.model is None:
            raise ValueError(
                f"{loss.__name__} adds the teacher's embeddings to its hidden states, but an adapter on the student's "
                "base has none that stay as they are. Give a model of its own as the teacher, or choose gold."
            )
        self.teacher_model = [teacher.model]  # in a list, so that it is no part of this module
        self.matched = teacher.matched
        heads = [head_module(model) for model in (student, teacher.model)]
        embeddings = [_embeddings(model) for model in (student, teacher.model)]
        for role, head, embedding in zip(("student", "teacher"), heads, embeddings, strict=True):
            if not is_plain_head(head):
                raise ValueError(
                    f"{loss.__name__} applies the {role}'s head to projected states, which needs a plain linear "
                    f"head, got {type(head).__name__}. Exclude the head from the adapter's target modules and from "
                    "quantization, or choose gold."
                )
            if embedding.weight.shape[1] != head.weight.shape[1]:
                raise ValueError(
                    f"{loss.__name__} adds embeddings to hidden states, but the {role}'s embeddings have width "
                    f"{embedding.weight.shape[1]} and its hidden states {head.weight.shape[1]}. Choose gold."
                )
        own, other = (head.weight.detach().float() for head in heads)
        generator = torch.Generator().manual_seed(seed)
        if self.options.get("alignment", keyword_options(loss)["alignment"]) == "exact":
            ids = [one.to(own.device) for one in self.matched]
            other = other.to(own.device)
            starts = start_of_projection(other, own, ids[1], ids[0]), start_of_projection(own, other, *ids)
            for name, start in zip(("to_student", "to_teacher"), starts, strict=True):
                self.projections[name] = nn.Parameter(start)
        else:
            widths = own.shape[1], other.shape[1]
            self.start("query", 2 * widths[1], 2 * widths[0], generator)
            self.start("to_student", widths[0], widths[1], generator)
            self.start("to_teacher", widths[1], widths[0], generator)

    def student_viewed(self, model: nn.Module) -> Any:
        """`layers_viewed` of what the student's head reads."""
        return layers_viewed(model, {FEATURES})

    def forward(
        self,
        model: nn.Module,
        states: Tensor,
        head: LMHead,
        spans: SpanSignal,
        inputs: Mapping[str, Any],
        weight: Tensor,
        temperature: float,
    ) -> SpansLoss:
        """The loss of the spans of a batch.

        Args:
            model: The student.
            states: `(batch, length, width)`, what its head reads.
            weight: Of each token.

        Raises:
            ValueError: The teacher's hidden states are not at hand.
        """
        if not isinstance(spans.rows, HeadRows):
            raise ValueError(
                f"{self.loss.__name__} reads the teacher's hidden states, but the steps after its head are not known, "
                "so that only its logits are. Choose gold."
            )
        ids = inputs["input_ids"]
        device = states.device
        rows = states[:, -ids.shape[1] :].flatten(0, 1)[spans.places.to(device)]
        own = _side(model, rows, head, ids.flatten()[spans.places], spans.student)
        other = _side(self.teacher_model[0], spans.rows.hidden.to(device), spans.rows.head, spans.read, spans.teacher)
        matched = (one.to(device) for one in self.matched)
        return self.loss(
            own, other, spans.texts, *matched, dict(self.projections.items()), weight, temperature, **self.options
        )


def _embeddings(model: nn.Module) -> Any:
    return causal_lm_of(model).get_input_embeddings()


@torch.no_grad()
def _side(model: nn.Module, states: Tensor, head: LMHead, read: Tensor, tokens: Any) -> SpaceSide:
    embedding = _embeddings(model)
    there = embedding.weight.device
    before, after = (embedding(ids.to(there)).to(states.device) for ids in (read, tokens.targets))
    return SpaceSide(states, head, before, after, tokens.targets, tokens.sizes)
