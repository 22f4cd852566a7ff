"""Losses between mapped layers of student and teacher: which layers, what is read of them, and what is trained along.

The losses themselves are formulas in `losses/hidden/`. Projections are trained along (`trainers.trained_along`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.layer_map import layer_pairs
from hf_transfer_ext.losses.layer_reading import AT_HEADS, OF_ATTENTION
from hf_transfer_ext.models.heads import LMHead, causal_lm_of, head_module, head_of
from hf_transfer_ext.models.layer_views import (
    EMBEDDINGS,
    FEATURES,
    SIDES,
    LayerView,
    Side,
    layers_of,
    layers_viewed,
    width_of,
)
from hf_transfer_ext.models.plumbing import is_sharded
from hf_transfer_ext.registry import keyword_options
from hf_transfer_ext.teachers.documents import Document, documents_of
from hf_transfer_ext.teachers.live import inputs_for
from hf_transfer_ext.tensors import Mask, predicting_rows
from hf_transfer_ext.trainers.conversation import GATE, cross_entropy_of, network_shapes, speaker
from hf_transfer_ext.trainers.named_hidden_losses import NamedHiddenLoss, named_hidden_losses
from hf_transfer_ext.trainers.trained_along import TrainedAlong

#: The names of an auxiliary head, and of its bias if there is one, among the projections.
AUXILIARY_HEAD, AUXILIARY_BIAS = "auxiliary_head", "auxiliary_bias"
#: Tokens whose logits an auxiliary head is compared on at once.
LOGIT_TOKENS = 128

Views = dict[int, LayerView]
#: The views of a model's layers, for each side that a loss compares.
ViewsOfSides = dict[Side, Views]


@dataclass(frozen=True)
class ComparedTokens:
    """The tokens of a batch that losses between layers compare, and how much each of them counts.

    Args:
        inputs: What the models read.
        compared: True at the tokens whose layers are compared.
        labeled: True at the tokens where the head predicts a labeled token.
        labels: These labeled tokens; None where no token is predicted.
        texts: Finds the texts, whose `positions` are the tokens in `compared`.
        items: Number of items of the loss in each row of the batch: a compared token then counts as that number by the
            number of tokens compared in its row. None: it counts as one item.
        theirs: Where the same tokens, as many and in the same order, stand in the teacher's own batch; None where both
            models read one batch.
    """

    inputs: Mapping[str, Any]
    compared: Bool[Tensor, "batch length"]
    labeled: Bool[Tensor, "batch length"]
    labels: Int[Tensor, " labeled"] | None
    texts: Callable[[], list[Document]]
    items: Float[Tensor, " batch"] | None = None
    theirs: ComparedTokens | None = None

    @property
    def of_teacher(self) -> ComparedTokens:
        """The same tokens as the teacher reads them."""
        return self if self.theirs is None else self.theirs

    def shares(self, mask: Bool[Tensor, "batch length"]) -> Float[Tensor, " tokens"]:
        """What each token of a mask counts as, in items."""
        if self.items is None:
            return torch.ones(int(mask.sum()), device=mask.device)
        each = self.items.to(mask.device) / mask.sum(1).clamp(min=1)
        return each[:, None].expand(mask.shape)[mask]


def predicting_tokens(inputs: Mapping[str, Any], mask: Mask, labels: Int[Tensor, " tokens"]) -> ComparedTokens:
    """The tokens of a batch of a language model: those at which a labeled token is predicted.

    Args:
        mask: As `next_token_targets` gives it.
        labels: The labeled tokens.
    """
    places = pad(mask, (0, 1))
    return ComparedTokens(inputs, places, places, labels, lambda: documents_of(inputs, mask))


def tokens_of_texts(
    inputs: Mapping[str, Any],
    read: Bool[Tensor, "batch length"],
    items: Float[Tensor, " batch"],
    labeled: Bool[Tensor, "batch length"] | None = None,
    labels: Int[Tensor, " labeled"] | None = None,
    theirs: ComparedTokens | None = None,
) -> ComparedTokens:
    """The tokens of a batch with one text in each row, all of which are compared.

    The loss of a text is the mean over its tokens, and counts as often as the text has items.

    Args:
        read: True at the tokens of the texts: not at padding, nor at what the teacher does not read.
        items: Number of items of the loss in each text.
        labeled: True at the tokens that the head predicts, if there is such a head.
        labels: What is predicted there.
        theirs: Where the same tokens stand in the teacher's own batch.
    """

    def texts() -> list[Document]:
        rows, length = read.cpu().numpy(), read.shape[1]
        places = [np.flatnonzero(row) + number * length for number, row in enumerate(rows)]
        return [Document(one % length, np.arange(len(one)), one) for one in places if len(one)]

    labeled = torch.zeros_like(read) if labeled is None else labeled
    return ComparedTokens(inputs, read, labeled, labels, texts, items, theirs)


class BetweenLayers(NamedTuple):
    """What the losses between layers make of a batch.

    total: Sum over the items of the batch of all losses, each times its weight; carries the gradient.
    sums: For logs, without gradient: `hidden`, which is `total`; of several losses also each without its weight, as
        `hidden_mse`, `hidden_attention_mse`, `hidden_mse_encoder`, ...
    """

    total: Float[Tensor, ""]
    sums: dict[str, Tensor]


class HiddenLosses:
    """All losses between layers that a configuration names; their hooks read each layer once.

    Args:
        args: A `DistillationConfig`.
        student: The student, unwrapped.
        teacher: The model that runs as the teacher; the student itself, where an adapter on it teaches.
        causal: True for decoders; None: as each attention says of itself.

    Raises:
        ValueError: The models do not have the layers, or a loss cannot read what is asked for.
    """

    def __init__(self, args: Any, student: nn.Module, teacher: nn.Module, *, causal: bool | None = None) -> None:
        named = named_hidden_losses(args)
        self.losses = [
            HiddenLoss(one, student=student, teacher=teacher, seed=args.seed, causal=causal) for one in named
        ]

    def reads(self, side: Side) -> bool:
        """Whether a loss compares the layers of this side."""
        return any(loss.side == side for loss in self.losses)

    def student_viewed(self, model: nn.Module) -> Any:
        """`layers_viewed` of the student's mapped layers, for each side that is compared."""
        return self._viewed(model, 0)

    def teacher_viewed(self, model: nn.Module) -> Any:
        """`layers_viewed` of the teacher's mapped layers, for each side that is compared."""
        return self._viewed(model, 1)

    @contextmanager
    def _viewed(self, model: nn.Module, role: int) -> Iterator[ViewsOfSides]:
        with ExitStack() as stack:
            found: ViewsOfSides = {}
            for side in filter(self.reads, SIDES):
                losses = [loss for loss in self.losses if loss.side == side]
                layers = {pair[role] for loss in losses for pair in loss.pairs}
                attention = {pair[role] for loss in losses if loss.attends for pair in loss.pairs}
                found[side] = stack.enter_context(layers_viewed(model, layers, attention=attention, side=side))
            yield found

    def __call__(
        self,
        student: ViewsOfSides,
        teacher: ViewsOfSides,
        tokens: ComparedTokens,
        student_model: nn.Module,
        teacher_model: nn.Module,
        *,
        encoder: ComparedTokens | None = None,
    ) -> BetweenLayers:
        """The losses of a batch, of what the layers computed.

        Args:
            student: Carries the gradient.
            tokens: Those of decoders, or of models with one stack of layers.
            student_model: The student, unwrapped, whose upper layers run again in a conversation.
            teacher_model: The model that runs as the teacher, whose head or upper layers some losses read.
            encoder: The tokens of encoders beside decoders, where `reads("encoder")`.

        Raises:
            ValueError: No gradient flows through the student's layers, or states are not those of the tokens.
        """
        compared = {"decoder": tokens, "encoder": encoder}
        found, sums = [], {}
        for loss in self.losses:
            at, own, other = compared[loss.side], student[loss.side], teacher[loss.side]
            assert at is not None
            for view in own.values():
                _require_states(view, student_model, at.compared)
            for view in other.values():
                _require_states(view, teacher_model, at.of_teacher.compared)
            mask = at.labeled if loss.reading in AT_HEADS else at.compared
            values = loss(own, other, at, student_model, teacher_model)
            one = (values * at.shares(mask).to(values.device)).sum()
            found.append(loss.weight * one)
            if len(self.losses) > 1:
                sums[f"hidden_{loss.label.removeprefix('hidden_')}"] = one.detach()
        total = torch.stack([one.to(found[0].device) for one in found]).sum()
        return BetweenLayers(total, {"hidden": total.detach(), **sums})


def _require_states(view: LayerView, model: nn.Module, mask: Tensor) -> None:
    """Refuse states that are not those of the batch's tokens: only virtual tokens may stand in front of them."""
    states = view.states
    virtual = hasattr(model, "peft_config")
    if states is None or states.dim() != 3 or len(states) != len(mask) or states.shape[1] < mask.shape[1] or (
        states.shape[1] != mask.shape[1] and not virtual
    ):  # fmt: skip
        raise ValueError(
            f"The layers of {type(causal_lm_of(model)).__name__} give states of shape "
            f"{None if states is None else tuple(states.shape)}, needed is one for each token of a batch of shape "
            f"{tuple(mask.shape)}. Leave `hidden_loss` out, or choose a model that keeps its tokens apart."
        )
    if view.query is not None and view.key is not None and view.query.shape[2] != view.key.shape[2]:
        raise ValueError(
            f"In a layer of {type(causal_lm_of(model)).__name__} that `layer_map` names, {view.query.shape[2]} tokens "
            f"attend to {view.key.shape[2]} others, such as parts of an image. Name layers with attention between the "
            "tokens of a text, or choose a loss on hidden states, such as hidden_mse."
        )


class HiddenLoss(TrainedAlong):
    """A loss of `HIDDEN_LOSSES` between mapped layers, as a mean over the pairs of layers.

    Args:
        named: Which loss, with its layer map and options.
        student: The student, unwrapped.
        teacher: The model that runs as the teacher; the student itself, where an adapter on it teaches.
        seed: Of the projections' start, which is the same on all processes.
        causal: True for decoders; None: as each attention says of itself.

    Raises:
        ValueError: The models do not have the layers, or the loss cannot read what is asked for.
    """

    def __init__(
        self,
        named: NamedHiddenLoss,
        *,
        student: nn.Module,
        teacher: nn.Module,
        seed: int,
        causal: bool | None = None,
    ) -> None:
        super().__init__(
            "hidden_loss",
            "Use a loss without (`attention_relation`, `token_relationship_graph`), a teacher of the student's width, "
            "or plain DDP.",
        )
        self.name, self.label, self.weight, self.reading = named.name, named.label, named.weight, named.reading
        self.loss, self.options, self.causal = HIDDEN_LOSSES[named.name], dict(named.options), causal
        self.side: Side = named.side or "decoder"
        models = (student, teacher)
        depths = [len(layers_of(model, self.side)) for model in models]
        widths = [width_of(model, self.side) for model in models]
        self.pairs = [(FEATURES, FEATURES)] if self.reading in AT_HEADS else _mapped(named.layer_map, *depths)
        if named.embeddings:
            self.pairs = [(EMBEDDINGS, EMBEDDINGS), *self.pairs]
        if self.reading == "messages":
            self._start_conversation(named.name, widths, seed)
        if self.reading == "logits":
            own = head_module(student)
            self.projections[AUXILIARY_HEAD] = nn.Parameter(own.weight.detach().float().clone())
            if getattr(own, "bias", None) is not None:
                self.projections[AUXILIARY_BIAS] = nn.Parameter(own.bias.detach().float().clone())
        if self.reading in ("states", "features") and widths[0] != widths[1]:
            generator = torch.Generator().manual_seed(seed)
            for pair in self.pairs:
                self.start(_key(pair), widths[1], widths[0], generator)

    @property
    def attends(self) -> bool:
        """Whether the loss reads attention."""
        return self.reading in OF_ATTENTION

    def _start_conversation(self, name: str, widths: Sequence[int], seed: int) -> None:
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
        if self.options.get("gated", keyword_options(self.loss)["gated"]):
            self.projections[GATE] = nn.Parameter(torch.zeros(1, 1))

    def forward(
        self,
        student: Views,
        teacher: Views,
        tokens: ComparedTokens,
        student_model: nn.Module,
        teacher_model: nn.Module,
    ) -> Float[Tensor, " tokens"]:
        """The loss at each token that counts, in the reading order of the batch; see `HiddenLosses.__call__`."""
        texts = head = None
        if self.reading in AT_HEADS:
            head = teacher_head(teacher_model)
        elif self.reading not in ("states", "messages"):
            texts = tuple(_Texts(one.texts(), one.compared.shape) for one in (tokens, tokens.of_teacher))
        values = []
        for pair in self.pairs:
            own, other = student[pair[0]], teacher[pair[1]]
            if self.reading == "messages":
                values.append(self._conversation(pair, own, other, tokens, student_model, teacher_model))
            elif texts is None:
                values.append(self._at_tokens(pair, own, other, tokens, head))
            else:
                values.append(self._in_texts(own, other, *texts))
        found = torch.stack([one.to(values[0].device) for one in values]).mean(0)
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError(
                "No gradient flows through the layers of the student that `layer_map` names: nothing in or below them "
                "is trained, or gradient checkpointing is reentrant. Name other layers, or set "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        return found

    def _at_tokens(
        self, pair: tuple[int, int], own: LayerView, other: LayerView, tokens: ComparedTokens, head: LMHead | None
    ) -> Tensor:
        student, teacher = (
            _rows(view.states, at.compared if head is None else at.labeled)
            for view, at in ((own, tokens), (other, tokens.of_teacher))
        )
        teacher = teacher.to(student.device)
        key = _key(pair)
        if self.reading == "logits" and head is not None:
            return self._of_logits(student, teacher, head)
        more = []
        if head is not None and tokens.labels is not None:
            more = [head.weight[tokens.labels.to(head.weight.device)].to(student.device)]
        projection = self.projections[key] if key in self.projections else None
        return self.loss(student, teacher, projection, *more, **self.options)

    def _of_logits(self, student: Tensor, teacher: Tensor, head: LMHead) -> Tensor:
        """The loss between an auxiliary head and the teacher's, `LOGIT_TOKENS` tokens at a time."""
        auxiliary = self.projections[AUXILIARY_HEAD]
        bias = self.projections[AUXILIARY_BIAS] if AUXILIARY_BIAS in self.projections else None
        shared = min(len(auxiliary), head.vocab_size)
        top = min(self.options.get("top", keyword_options(self.loss)["top"]), shared)

        def part(own: Tensor, other: Tensor) -> Tensor:
            with torch.no_grad():
                found = head.logits(other.to(head.weight.device))[:, :shared].float().topk(top)
            ids = found.indices.to(own.device)
            logits = torch.einsum("tw,tkw->tk", own.float(), auxiliary[ids])
            if bias is not None:
                logits = logits + bias[ids]
            return self.loss(logits, found.values.to(own.device), **self.options)

        blocks = zip(student.split(LOGIT_TOKENS), teacher.split(LOGIT_TOKENS), strict=True)
        return torch.cat([checkpoint(part, own, other, use_reentrant=False) for own, other in blocks])

    def _conversation(
        self, pair: tuple[int, int], own: LayerView, other: LayerView, tokens: ComparedTokens,
        student_model: nn.Module, teacher_model: nn.Module,
    ) -> Tensor:  # fmt: skip
        assert own.states is not None and other.states is not None and tokens.labels is not None
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
        read, weights, mask = dict(tokens.inputs), dict(self.projections.items()), tokens.labeled[:, :-1]
        theirs = inputs_for(teacher_model, student_model, read) | {"use_cache": False}
        student = speaker("student", student_model, pair[0], own.states, read, weights)
        teacher = speaker("teacher", teacher_model, pair[1], other.states.detach(), theirs, weights)
        task = cross_entropy_of(student_model, mask, tokens.labels)
        return self.loss(student, teacher, task, lambda x: predicting_rows(x, mask), **self.options)

    def _is_causal(self, own: LayerView, other: LayerView) -> bool:
        if self.causal is not None:
            return self.causal
        found = own.causal, other.causal
        if None in found or found[0] != found[1]:
            words = {True: "only itself and the tokens before it", False: "all tokens", None: "what it does not say"}
            raise ValueError(
                f"{self.name} compares attention, but a token of the student looks at {words[own.causal]}, and one of "
                f"the teacher at {words[other.causal]}. Choose a loss on hidden states, such as hidden_mse."
            )
        return bool(found[0])

    def _in_texts(self, own: LayerView, other: LayerView, texts: _Texts, theirs: _Texts) -> Tensor:
        options = dict(self.options)
        causal = self.attends and self._is_causal(own, other)
        if "causal" in keyword_options(self.loss):
            options["causal"] = causal
        models = ((own, texts), (other, theirs))
        if self.reading == "sequences":
            calls: list[tuple[Tensor, ...]] = [tuple(at.tokens(view.states) for view, at in models)]
        elif self.reading in ("scores", "attention"):
            read = [at.pairs_of_tokens(view.scores(), causal=causal) for view, at in models]
            if self.reading == "attention":
                read += [at.tokens(_joined(view.attended_values())) for view, at in models]
            calls = [tuple(read)]
        else:
            parts = ("query", "key", "value")
            calls = [tuple(at.tokens(_joined(getattr(view, part))) for view, at in models) for part in parts]
        mask = texts.mask.to(calls[0][0].device)
        found = [self.loss(*(one.to(mask.device) for one in call), mask, **options) for call in calls]
        return torch.stack(found).sum(0)[texts.counts.to(mask.device)]


def _rows(states: Tensor | None, mask: Bool[Tensor, "batch length"]) -> Tensor:
    """The states at the positions of a mask, in reading order. Virtual tokens in front of the batch are left out."""
    assert states is not None
    return states[:, -mask.shape[1] :][mask.to(states.device)]


class _Texts:
    """Where the texts of a batch stand: padding left out and packed rows split."""

    def __init__(self, documents: Sequence[Document], shape: tuple[int, ...]) -> None:
        longest = max((len(one.ids) for one in documents), default=1)
        self.places = torch.zeros(len(documents), longest, dtype=torch.long)
        self.mask = torch.zeros(len(documents), longest, dtype=torch.bool)
        self.counts = torch.zeros(len(documents), longest, dtype=torch.bool)
        for i, one in enumerate(documents):
            self.places[i, : len(one.ids)] = torch.from_numpy(one.places)
            self.mask[i, : len(one.ids)] = True
            self.counts[i, one.positions] = True
        self.shape = tuple(shape)

    def tokens(self, states: Tensor | None) -> Tensor:
        """`(batch, length, width)` -> `(texts, longest, width)`. Virtual tokens in front of the batch are left out."""
        assert states is not None
        return states[:, -self.shape[1] :].flatten(0, 1)[self.places.to(states.device)]

    def pairs_of_tokens(self, scores: Tensor, *, causal: bool) -> Tensor:
        """`(batch, heads, length, length)` -> `(texts, heads, longest, longest)`; of decoders -inf at later tokens."""
        length = self.shape[1]
        places = self.places.to(scores.device)
        rows, columns = (places // length)[:, 0], places % length
        own = scores[..., -length:, -length:][rows]
        at = columns[:, None, :, None], columns[:, None, None, :]
        heads = torch.arange(own.shape[1], device=own.device)[None, :, None, None]
        texts = torch.arange(len(own), device=own.device)[:, None, None, None]
        found = own[texts, heads, at[0], at[1]]
        if not causal:
            return found
        later = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
        return found.masked_fill(later, -torch.inf)


def _joined(heads: Tensor | None) -> Tensor:
    """`(batch, heads, length, head width)` -> `(batch, length, width)`."""
    assert heads is not None
    return heads.transpose(1, 2).flatten(2)


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
