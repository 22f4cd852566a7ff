"""Losses over a vocabulary, computed inside the model's head: what tasks that predict tokens share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hf_transfer_ext.losses.fused import FusedLoss, divergence_of_logits, fused_divergence
from hf_transfer_ext.losses.layer_reading import Reading
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.heads import LMHead, head_of, run_to_head
from hf_transfer_ext.models.plumbing import head_is_understood, no_cache
from hf_transfer_ext.tensors import IGNORE_INDEX
from hf_transfer_ext.trainers.distillation_task import NO_TALK, DistillationTask, TaskLoss
from hf_transfer_ext.trainers.hidden_loss import ComparedTokens, tokens_of_texts
from hf_transfer_ext.trainers.task_metrics import kl_of, ratio, sums_by_row


def loss_inside_the_head(
    model: nn.Module, inputs: Mapping[str, Any], losses_of: Callable[[Tensor, LMHead], FusedLoss]
) -> tuple[Any, FusedLoss]:
    """Run a model with the loss in place of its head: no logits, and the weights whole however sharded.

    Args:
        losses_of: Called with the head's input, `(batch, length, hidden)`, and the head.

    Returns:
        The model's output, whose `logits` are meaningless, and the loss.
    """
    found: list[FusedLoss] = []

    def loss_of(hidden: Tensor) -> Tensor:
        found.append(losses_of(hidden, head_of(model)))
        # Stands where the logits would: it has to lead to the loss, and through it to the head.
        return hidden[..., :1] + 0.0 * found[-1].loss

    outputs = run_to_head(model, loss_of, **inputs)
    return outputs, found[-1]


def rows_at(states: Float[Tensor, "batch length size"], mask: Bool[Tensor, "batch length"]) -> Tensor:
    """Hidden states or logits at the positions of a mask: `(items, size)`."""
    return states[mask.to(states.device)]


class TokenTask(DistillationTask):
    """Base of tasks whose items are tokens that both models predict at the same positions."""

    shares_tokens: ClassVar[bool] = True
    needs_teachers_reader: ClassVar[bool] = False
    uses_a_head: ClassVar[bool] = True
    #: Whether the items of a row are an answer, of which a share is written exactly.
    has_answers: ClassVar[bool] = False
    select: ClassVar[Any] = staticmethod(rows_at)
    unread: ClassVar[Mapping[Reading, str]] = {"messages": NO_TALK}

    def __init__(self, args: Any, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any = None) -> None:
        super().__init__(args, student, teacher, tokenizer, None)
        self._fused = None if args.fused else False  # None until the first batch shows whether the head allows it

    def items(self, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch length"]:
        return batch["labels"] != IGNORE_INDEX

    def losses(self, model: Any, teacher: Any, batch: Mapping[str, Tensor], weight: Tensor) -> TaskLoss:
        mask = self.items(batch)
        inputs = {**self.inputs(model, batch), **no_cache(model)}
        signal = None
        if teacher is not None:
            read = self.inputs(teacher.network, batch, of_teacher=True)
            with self.viewed("teacher", teacher.network):
                signal = teacher.signal(model, read, self.teacher_mask(batch))
        terms: dict[str, Any] = {
            "teacher": None if signal is None else signal.rows,
            "divergence": self.loss,
            "weights": weight.expand(int(mask.sum())),
            "labels": self.targets(batch)[mask],
            "kd_weight": 0.0 if signal is None else self.args.kd_weight,
            "ce_weight": self.args.ce_weight,
            "temperature": self.args.distill_temperature,
            "statistics": True,
            **self.args.loss_options,
        }

        def losses_of(states: Tensor, head: LMHead | None) -> FusedLoss:
            rows = self.select(states, mask)
            if head is None:
                return divergence_of_logits(rows, **terms)
            return fused_divergence(rows, head, float32_logits=self.args.float32_logits, **terms)

        if self._fused is None:
            self._fused = head_is_understood(model)
        with self.viewed("student", model):
            if self._fused and not self.wants_outputs:
                outputs, parts = loss_inside_the_head(model, inputs, losses_of)
            else:
                outputs = model(**inputs)
                parts = losses_of(outputs.logits, None)
        assert parts.statistics is not None
        sums = {"kd": parts.divergence.sum(), "ce": parts.cross_entropy.sum(), "labelled": mask.sum()}
        sums |= {"correct": parts.statistics.correct.sum(), "entropy": parts.statistics.entropy.sum()}
        # DDP and FSDP follow a model's output to the parameters that made it: all of the output leads to the loss.
        return TaskLoss(parts.loss + 0.0 * outputs.logits[..., :1].sum(), outputs, sums)

    def teacher_mask(self, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch length"]:
        """Where the items are in what the teacher reads, in the same order as in `items`."""
        return self.items(batch)

    def compared_tokens(self, batch: Mapping[str, Tensor]) -> ComparedTokens:
        labeled = self.items(batch)
        labels, read = self.targets(batch)[labeled], self.tokens_read(batch)
        return tokens_of_texts(batch, read, self.items_of_texts(batch), labeled, labels)

    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The token to predict at each position of `items`."""
        return batch["labels"]

    def measure(
        self, model: Any, rows: Any, reference: Any = None, *, batch_size: int = 16, dataset: str | None = None
    ) -> list[Measurement]:
        """Nats per token and accuracy; the share of exact answers; KL and agreement with a reference.

        An answer is exact where each of its tokens is the model's first choice behind the tokens before it, which is
        what greedy decoding writes, up to the answer's length, without settings such as a repetition penalty.
        """
        found: list[list[np.ndarray]] = []
        for batch in self.batches(model, rows, batch_size):
            mask = self.items(batch)
            logits = self.select(model(**self.inputs(model, batch)).logits, mask).float()
            labels = self.targets(batch)[mask]
            chosen = logits.argmax(-1)
            values = [torch.ones_like(labels), nn.functional.cross_entropy(logits, labels, reduction="none")]
            values.append(chosen == labels)
            if reference is not None:
                with reference.running(model) as network:
                    read = self.inputs(network, batch, of_teacher=True)
                    theirs = self.select(network(**read).logits, self.teacher_mask(batch)).float()
                shared = min(theirs.shape[1], logits.shape[1])
                values += [kl_of(theirs[:, :shared], logits[:, :shared]), chosen == theirs.argmax(-1)]
            row = mask.nonzero()[:, 0]
            found.append([sums_by_row(one, row, len(mask)) for one in values])
        counts, nats, hits, *compared = (np.concatenate(one) for one in zip(*found, strict=True))
        measured = ratio("nats_per_token", nats, counts, dataset, unit="nats", higher_is_better=False)
        measured += ratio("accuracy", hits, counts, dataset)
        if self.has_answers:
            measured += ratio("exact_match", hits == counts, counts > 0, dataset)
        if compared:
            kl, agrees = compared
            measured += ratio("kl_to_teacher", kl, counts, dataset, unit="nats per token", higher_is_better=False)
            measured += ratio("teacher_agreement", agrees, counts, dataset)
        return measured
