"""A loss between mapped layers of student and teacher: which layers, what is read of them, and what is trained along.

The losses themselves are formulas in `losses/hidden/`. Projections are trained along (`trainers.trained_along`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.layer_map import layer_pairs
from hf_transfer_ext.losses.layer_reading import AT_HEADS, reading_of
from hf_transfer_ext.models.heads import LMHead, causal_lm_of, head_module, head_of
from hf_transfer_ext.models.layer_views import EMBEDDINGS, FEATURES, LayerView, layers_viewed
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.registry import keyword_options
from hf_transfer_ext.teachers.documents import documents_of
from hf_transfer_ext.teachers.live import inputs_for
from hf_transfer_ext.tensors import Mask, predicting_rows
from hf_transfer_ext.trainers.conversation import cross_entropy_of, network_shapes, speaker
from hf_transfer_ext.trainers.trained_along import TrainedAlong

logger = logging.getLogger(__name__)

#: The name of an auxiliary head among the projections.
AUXILIARY_HEAD = "auxiliary_head"
#: Tokens whose logits an auxiliary head is compared on at once.
LOGIT_TOKENS = 128

Views = dict[int, LayerView]


class HiddenLoss(TrainedAlong):
    """A loss of `HIDDEN_LOSSES` between mapped layers, as a mean over the pairs of layers.

    Args:
        name: A name of `HIDDEN_LOSSES`.
        options: The loss's own options.
        mapping: A name of `LAYER_MAPS`, or pairs of layers (`losses.layer_map.layer_pairs`).
        embeddings: Compare the embeddings (what the first layers read), too.
        student: The student, unwrapped.
        teacher: The model that runs as the teacher; the student itself, where an adapter on it teaches.
        seed: Of the projections' start, which is the same on all processes.

    Raises:
        ValueError: The models do not have the layers, or the loss cannot read what is asked for.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        mapping: Any,
        *,
        embeddings: bool,
        student: nn.Module,
        teacher: nn.Module,
        seed: int,
    ) -> None:
        super().__init__(
            "hidden_loss",
            "Use a loss without (`attention_relation`, `token_relationship_graph`), a teacher of the student's width, "
            "or plain DDP.",
        )
        self.loss, self.options = HIDDEN_LOSSES[name], dict(options)
        self.reading = reading_of(self.loss)
        if "causal" in keyword_options(self.loss):
            self.options["causal"] = True
        depths, widths = zip(*(_shape(model) for model in (student, teacher)), strict=True)
        self.pairs = [(FEATURES, FEATURES)] if self.reading in AT_HEADS else _mapped(mapping, *depths)
        if embeddings:
            if self._attends:
                raise ValueError(f"`hidden_embeddings` is set, but {name} reads attention, which embeddings have not.")
            self.pairs = [(EMBEDDINGS, EMBEDDINGS), *self.pairs]
        if self.reading == "messages":
            self._start_conversation(name, widths, seed)
        if self.reading == "logits":
            start = head_module(student).weight.detach().float().clone()
            self.projections[AUXILIARY_HEAD] = nn.Parameter(start)
        if self.reading in ("states", "features") and widths[0] != widths[1]:
            generator = torch.Generator().manual_seed(seed)
            for pair in self.pairs:
                self.start(_key(pair), widths[1], widths[0], generator)

    def _start_conversation(self, name: str, widths: tuple[int, ...], seed: int) -> None:
        if len(self.pairs) != 1:
            raise ValueError(
                f"{name} cuts both models at one layer, but `layer_map` names {len(self.pairs)} pairs. Name one, such "
                f"as [[{self.pairs[len(self.pairs) // 2][0]}, {self.pairs[len(self.pairs) // 2][1]}]]."
            )
        size = self.options.get("message_size", keyword_options(self.loss)["message_size"])
        generator = torch.Generator().manual_seed(seed)
        for role, width in zip(("student", "teacher"), widths, strict=True):
            for part, shape in network_shapes(role, width, size).items():
                self.start(part, *shape, generator)

    def student_viewed(self, model: nn.Module) -> Any:
        """`layers_viewed` of the student's mapped layers."""
        return layers_viewed(model, {own for own, _ in self.pairs}, attention=self._attends)

    def teacher_viewed(self, model: nn.Module) -> Any:
        """`layers_viewed` of the teacher's mapped layers."""
        return layers_viewed(model, {other for _, other in self.pairs}, attention=self._attends)

    @property
    def _attends(self) -> bool:
        return self.reading in ("relations", "scores", "attention")

    def forward(
        self,
        student: Views,
        teacher: Views,
        inputs: Mapping[str, Any],
        mask: Mask,
        labels: Int[Tensor, " tokens"],
        student_model: nn.Module,
        teacher_model: nn.Module,
    ) -> Float[Tensor, " tokens"]:
        """The loss at each position that predicts a labeled token, in the reading order of the batch.

        Args:
            student: What the student's layers computed; carries the gradient.
            teacher: What the teacher's layers computed.
            labels: The labeled tokens.
            student_model: The student, unwrapped, whose upper layers run again in a conversation.
            teacher_model: The model that runs as the teacher, whose head or upper layers some losses read.

        Raises:
            ValueError: No gradient flows through the student's layers.
        """
        at_tokens = self.reading in ("states", *AT_HEADS)
        texts = None if at_tokens or self.reading == "messages" else _Texts(inputs, mask)
        head = teacher_head(teacher_model) if self.reading in AT_HEADS else None
        values = []
        for pair in self.pairs:
            own, other = student[pair[0]], teacher[pair[1]]
            if self.reading == "messages":
                models = student_model, teacher_model
                values.append(self._conversation(pair, own, other, inputs, mask, labels, *models))
            elif texts is None:
                values.append(self._at_tokens(pair, own, other, mask, labels, head))
            else:
                values.append(self._in_texts(own, other, texts))
        found = torch.stack(values).mean(0)
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError(
                "No gradient flows through the layers of the student that `layer_map` names: nothing in or below them "
                "is trained, or gradient checkpointing is reentrant. Name other layers, or set "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        return found

    def _at_tokens(
        self, pair: tuple[int, int], own: LayerView, other: LayerView, mask: Mask, labels: Tensor, head: LMHead | None
    ) -> Tensor:
        assert own.states is not None and other.states is not None
        student = predicting_rows(own.states, mask)
        teacher = predicting_rows(other.states, mask).to(student.device)
        key = _key(pair)
        if self.reading == "logits" and head is not None:
            return self._of_logits(student, teacher, head)
        more = [] if head is None else [head.weight[labels.to(head.weight.device)].to(student.device)]
        projection = self.projections[key] if key in self.projections else None
        return self.loss(student, teacher, projection, *more, **self.options)

    def _of_logits(self, student: Tensor, teacher: Tensor, head: LMHead) -> Tensor:
        """The loss between an auxiliary head and the teacher's, `LOGIT_TOKENS` tokens at a time."""
        auxiliary = self.projections[AUXILIARY_HEAD]
        shared = min(len(auxiliary), head.vocab_size)
        top = min(self.options.get("top", keyword_options(self.loss)["top"]), shared)

        def part(own: Tensor, other: Tensor) -> Tensor:
            with torch.no_grad():
                found = head.logits(other.to(head.weight.device))[:, :shared].float().topk(top)
            logits = torch.einsum("tw,tkw->tk", own.float(), auxiliary[found.indices.to(own.device)])
            return self.loss(logits, found.values.to(own.device), **self.options)

        blocks = zip(student.split(LOGIT_TOKENS), teacher.split(LOGIT_TOKENS), strict=True)
        return torch.cat([checkpoint(part, own, other, use_reentrant=False) for own, other in blocks])

    def _conversation(
        self, pair: tuple[int, int], own: LayerView, other: LayerView, inputs: Mapping[str, Any], mask: Mask,
        labels: Tensor, student_model: nn.Module, teacher_model: nn.Module,
    ) -> Tensor:  # fmt: skip
        assert own.states is not None and other.states is not None
        if causal_lm_of(student_model) is causal_lm_of(teacher_model):
            raise ValueError(
                "In a conversation gradients pass through the teacher, which cannot be an adapter of the student. "
                "Give a model of its own as the teacher, or choose another `hidden_loss`."
            )
        if own.states.shape[:2] != other.states.shape[:2]:
            raise ValueError(
                f"In a conversation both models read the same positions, but the student has {own.states.shape[1]} "
                f"and the teacher {other.states.shape[1]}: virtual tokens (prompt learning) are in front of one of "
                "them. Choose another adapter, or another `hidden_loss`."
            )
        read, weights = dict(inputs), dict(self.projections.items())
        theirs = inputs_for(teacher_model, student_model, read) | {"use_cache": False}
        student = speaker("student", student_model, pair[0], own.states, read, weights)
        teacher = speaker("teacher", teacher_model, pair[1], other.states.detach(), theirs, weights)
        task = cross_entropy_of(student_model, mask, labels)
        return self.loss(student, teacher, task, lambda x: predicting_rows(x, mask), **self.options)

    def _in_texts(self, own: LayerView, other: LayerView, texts: _Texts) -> Tensor:
        if self.reading == "sequences":
            sides: list[tuple[Tensor, ...]] = [(texts.tokens(own.states), texts.tokens(other.states))]
        elif self.reading == "scores":
            scores = [texts.pairs_of_tokens(view.scores()) for view in (own, other)]
            sides = [(scores[0], scores[1])]
        elif self.reading == "attention":
            scores = [texts.pairs_of_tokens(view.scores()) for view in (own, other)]
            values = [texts.tokens(_joined(view.attended_values())) for view in (own, other)]
            sides = [(*scores, *values)]
        else:
            parts = ("query", "key", "value")
            both = [[texts.tokens(_joined(getattr(view, part))) for part in parts] for view in (own, other)]
            sides = list(zip(*both, strict=True))
        mask = texts.mask.to(sides[0][0].device)
        found = [self.loss(*(one.to(mask.device) for one in side), mask, **self.options) for side in sides]
        return torch.stack(found).sum(0)[texts.counts.to(mask.device)]


class _Texts:
    """Where the texts of a batch stand: padding left out and packed rows split."""

    def __init__(self, inputs: Mapping[str, Any], mask: Mask) -> None:
        documents = documents_of(inputs, mask)
        longest = max((len(one.ids) for one in documents), default=1)
        self.places = torch.zeros(len(documents), longest, dtype=torch.long)
        self.mask = torch.zeros(len(documents), longest, dtype=torch.bool)
        self.counts = torch.zeros(len(documents), longest, dtype=torch.bool)
        for i, one in enumerate(documents):
            self.places[i, : len(one.ids)] = torch.from_numpy(one.places)
            self.mask[i, : len(one.ids)] = True
            self.counts[i, one.positions] = True
        self.shape = tuple(inputs["input_ids"].shape)

    def tokens(self, states: Tensor | None) -> Tensor:
        """`(batch, length, width)` -> `(texts, longest, width)`. Virtual tokens in front of the batch are left out."""
        assert states is not None
        return states[:, -self.shape[1] :].flatten(0, 1)[self.places.to(states.device)]

    def pairs_of_tokens(self, scores: Tensor) -> Tensor:
        """`(batch, heads, length, length)` -> `(texts, heads, longest, longest)`, -inf where nothing is looked at."""
        length = self.shape[1]
        places = self.places.to(scores.device)
        rows, columns = (places // length)[:, 0], places % length
        own = scores[..., -length:, -length:][rows]
        at = columns[:, None, :, None], columns[:, None, None, :]
        heads = torch.arange(own.shape[1], device=own.device)[None, :, None, None]
        texts = torch.arange(len(own), device=own.device)[:, None, None, None]
        found = own[texts, heads, at[0], at[1]]
        later = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
        return found.masked_fill(later, -torch.inf)


def _joined(heads: Tensor | None) -> Tensor:
    """`(batch, heads, length, head width)` -> `(batch, length, width)`."""
    assert heads is not None
    return heads.transpose(1, 2).flatten(2)


def _shape(model: nn.Module) -> tuple[int, int]:
    """(layers, width) of a model."""
    config = causal_lm_of(model).config.get_text_config()
    return config.num_hidden_layers, config.hidden_size


def _mapped(mapping: Any, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Pairs of layers; those in YAML are lists."""
    pairs = mapping if isinstance(mapping, str) else [tuple(pair) for pair in mapping]
    return layer_pairs(pairs, student_layers, teacher_layers)


def _key(pair: tuple[int, int]) -> str:
    names = ({EMBEDDINGS: "embeddings", FEATURES: "features"}.get(layer, str(layer)) for layer in pair)
    return "student_{}_teacher_{}".format(*names)


def teacher_head(teacher: nn.Module) -> LMHead:
    """The teacher's head, for losses that read it.

    Raises:
        ValueError: The head is adapted or quantized, or sharded.
    """
    if is_sharded(teacher):
        raise ValueError("The head of a sharded teacher cannot be read. Use another `hidden_loss`, or plain DDP.")
    return head_of(teacher).detach()
