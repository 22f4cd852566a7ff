"""What a task states for its distillation: how rows become batches, where the loss is taken, and what is measured."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from hf_transfer_ext import __version__
from hf_transfer_ext.data.text import warn_of_unused
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.layer_reading import Reading
from hf_transfer_ext.losses.slopes import own_options
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.models.loading import call_settings_restored, load_tokenizer, tokenizer_in
from hf_transfer_ext.models.plumbing import accepts, evaluation_mode
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.tensors import predicting_rows
from hf_transfer_ext.trainers.hidden_loss import (
    BetweenLayers,
    ComparedTokens,
    HiddenLosses,
    ViewsOfSides,
    tokens_of_texts,
)
from hf_transfer_ext.weights.kinds import MODEL_KINDS, ModelKind

logger = logging.getLogger(__name__)

#: Why losses that read a head over a vocabulary, or talk through one, are not for a task without.
NO_HEAD = "it reads a head over a vocabulary, which these models do not have"
NO_TALK = "models talk through the layers of decoders that predict the next token"
#: In front of the teacher's inputs in a batch, where it reads the rows with a tokenizer of its own.
TEACHER = "teacher_"


class TaskLoss(NamedTuple):
    """The loss of a batch.

    loss: This batch's share of the step's mean; carries the gradient.
    outputs: What the student returned.
    sums: Name -> sum over the items of the batch, for logs: `kd`, `ce`, ...
    """

    loss: Float[Tensor, ""]
    outputs: Any
    sums: dict[str, Tensor]


class DistillationTask(ABC):
    """Base of the tasks in `trainers/tasks/`, one file each. The name of the class is the name of the task.

    The loss is a mean over *items*: texts, words or tokens. `losses` returns a sum over the items of a batch, each
    with the weight that it is given, so that a step does not depend on how it was split into batches.

    Args:
        args: A `DistillationConfig`.
        student: The student, unwrapped.
        teacher: The model that runs as the teacher; None for plain fine-tuning.
        tokenizer: The student's tokenizer (or processor).
        teacher_tokenizer: The teacher's; None where both read the same tokens.
    """

    #: Columns that rows must have, and those that they may have.
    needs: ClassVar[tuple[str, ...]] = ("text",)
    may_have: ClassVar[tuple[str, ...]] = ()
    #: Columns of the data that batches are made of, beside what `row` returns.
    keeps: ClassVar[tuple[str, ...]] = ()
    #: Keys of `task_options` with their defaults.
    options: ClassVar[Mapping[str, Any]] = {}
    #: Losses of this task beside, or instead of, the divergences.
    own_losses: ClassVar[Mapping[str, Any]] = {}
    takes_divergences: ClassVar[bool] = True
    #: Whether the teacher has to read the tokens of the student.
    shares_tokens: ClassVar[bool] = False
    #: Whether the teacher reads rows with a tokenizer or processor of its own.
    needs_teachers_reader: ClassVar[bool] = True
    #: Whether the loss is taken inside a head over the vocabulary.
    uses_a_head: ClassVar[bool] = False
    #: What losses between layers cannot read of these models -> why (`losses.layer_reading`).
    unread: ClassVar[Mapping[Reading, str]] = {"features": NO_HEAD, "logits": NO_HEAD, "messages": NO_TALK}
    #: The same of an encoder beside a decoder, for `side: encoder`; None where there is not one.
    unread_in_encoder: ClassVar[Mapping[Reading, str] | None] = None
    #: Set by the trainer: whether batches are for evaluation, and whether the student's whole output is asked for.
    evaluates: bool = False
    wants_outputs: bool = False
    #: What the layers of "student" and "teacher" compute in this batch; None where no loss compares them.
    views: dict[str, ViewsOfSides] | None = None
    #: Which rows of hidden states, or logits, a mask of positions selects.
    select: ClassVar[Any] = staticmethod(predicting_rows)

    def __init__(
        self, args: Any, student: nn.Module, teacher: nn.Module | None, tokenizer: Any, teacher_tokenizer: Any = None
    ) -> None:
        self.args = args
        self.settings = {**self.options, **args.task_options}
        self.tokenizer, self.teacher_tokenizer = tokenizer, teacher_tokenizer
        self.reads_apart = teacher is not None and not same_tokens(tokenizer, teacher_tokenizer)
        if args.loss in self.own_losses:
            self.loss: Any = self.own_losses[args.loss]
        else:
            self.loss = DISTILLATION_LOSSES[args.loss]
        self.between: HiddenLosses | None = None
        if args.hidden_loss is not None and teacher is not None:
            if self.reads_apart:
                raise ValueError(
                    "`hidden_loss` compares layers token by token, but the teacher reads a text in other tokens than "
                    "the student. Give the student the teacher's tokenizer, or leave `hidden_loss` out."
                )
            self.between = HiddenLosses(args, student, teacher)

    # ---- Settings ----

    @classmethod
    def kind(cls) -> ModelKind:
        """Which Auto class loads the models of this task, and what the Hub and PEFT call it."""
        return MODEL_KINDS[cls.__name__]

    @classmethod
    def check(cls, args: Any) -> None:
        """Refuse settings that this task does not obey.

        Raises:
            ValueError: An unknown loss, or an unknown option of the loss or the task.
        """
        known = [*cls.own_losses, *(DISTILLATION_LOSSES if cls.takes_divergences else ())]
        if args.loss not in known:
            raise ValueError(unknown_name(f"loss of the task {cls.__name__}", args.loss, known))
        options = loss_options(cls.own_losses[args.loss] if args.loss in cls.own_losses else None, args.loss)
        for name in args.loss_options:
            if name not in options:
                raise ValueError(unknown_name(f"option of {args.loss}", name, options or ["(it has none)"]))
        for name in () if cls.uses_a_head else ("fused", "float32_logits"):
            if not getattr(args, name):
                raise ValueError(f"`{name}` is off, but the task {cls.__name__} builds no logits of a vocabulary.")
        if args.loss in cls.own_losses and args.distill_temperature != 1:
            raise ValueError(
                f"`distill_temperature` is {args.distill_temperature}, but {args.loss} has no probabilities to "
                "soften. Leave it at 1."
            )
        for name in args.task_options:
            if name not in cls.options:
                known = list(cls.options) or ["(it has none)"]
                raise ValueError(unknown_name(f"option of the task {cls.__name__}", name, known))

    @classmethod
    def loading(cls, name: Any, revision: str | None = None, *, like: Any = None, data: Any = None) -> dict[str, Any]:
        """Arguments of `load_model` for a checkpoint of this task, or one that has no output layer for it yet.

        Args:
            name: Folder or Hub id.
            like: Config of a model whose labels it is to have, if it has no output layer.
            data: Rows to take the labels from without `like`.
        """
        return {"auto_class": cls.kind().auto_class}

    @classmethod
    def load_reader(cls, name: Any, **how: Any) -> Any:
        """Load what turns rows into a model's inputs: its tokenizer, or its processor.

        Args:
            name: Folder or Hub id of the model.
            how: Arguments of `load_tokenizer` or `load_processor`.
        """
        return load_tokenizer(name, **how)

    @classmethod
    def check_reader(cls, role: str, reader: Any) -> None:
        """Refuse a tokenizer or processor that this task cannot read rows with.

        Raises:
            ValueError: It lacks a part that the task needs.
        """
        return None

    @classmethod
    def trainable(cls, args: Any, student: Any, adapter: PeftConfig | None = None) -> Any:
        """The student with what is to be trained of it: an adapter, or all weights that are not frozen."""
        return student if adapter is None else get_peft_model(student, adapter)

    # ---- Rows and batches ----

    def prepared(self, dataset: Any) -> Any:
        """The rows as this task's inputs; other columns are left out, and told.

        Raises:
            ValueError: A column is missing, or a row does not hold what the task needs.
        """
        first = next(iter(dataset))
        if "input_ids" in first and not set(self.needs) <= set(first):
            raise ValueError(
                f"The task {type(self).__name__} reads {', '.join(self.needs)} and tokenizes them itself, but the "
                "rows hold `input_ids`. Give the columns that these were made of."
            )
        for name in self.needs:
            if name not in first:
                raise ValueError(
                    f"The task {type(self).__name__} needs a column {name!r}, but the rows have "
                    f"{', '.join(first)}. Rename yours: `dataset.rename_column(yours, {name!r})`, or `columns` of the "
                    "recipe."
                )
        used = [name for name in (*self.needs, *self.may_have) if name in first]
        warn_of_unused("of this training", list(first), used)
        self.read_features(getattr(dataset, "features", None) or {})
        left_out = [name for name in first if name not in self.keeps]
        return dataset.map(self._row, with_indices=True, remove_columns=left_out, **self._mapping(dataset))

    def _row(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """As `row`; an error says which row it is, counted from 0."""
        try:
            return self.row(row)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error

    def _mapping(self, dataset: Any) -> dict[str, Any]:
        """How `map` is called on a data set that is not streamed: processes, and a name under which it caches rows."""
        if not hasattr(dataset, "_fingerprint"):
            return {}
        readers = [self.tokenizer, self.teacher_tokenizer] if self.reads_apart else [self.tokenizer]
        parts = [dataset._fingerprint, str(dataset.features), type(self).__name__, __version__, repr(self.facts())]
        parts += [repr(self.settings), repr(self.args.max_length), *map(content_of, readers)]
        digest = sha256("\0".join(parts).encode()).hexdigest()[:16]
        return {"num_proc": self.args.dataset_num_proc, "new_fingerprint": digest}

    def read_features(self, features: Mapping[str, Any]) -> None:
        """Learn from a data set's own types what its columns mean, such as names of labels."""
        return None

    @abstractmethod
    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the data as plain lists and numbers; the teacher's inputs with `TEACHER` in front."""

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows as one batch, with `labels`."""

    def drawn(self, batch: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        """A batch as a training step reads it: what is drawn at random is drawn here, from `seed` and the step."""
        return batch

    def items(self, batch: Mapping[str, Tensor]) -> Bool[Tensor, "*shape"]:
        """Where the items of a batch are: True for each item that its loss is a mean over."""
        return torch.ones(len(batch["labels"]), dtype=torch.bool, device=batch["labels"].device)

    def encoded(self, *texts: Any, **how: Any) -> dict[str, Any]:
        """The tokens of a text, or of a pair, for the student, and for a teacher with another tokenizer."""
        found = self._cut(self.tokenizer, *texts, **how)
        if self.reads_apart:
            theirs = self._cut(self.teacher_tokenizer, *texts, **how)
            found |= {TEACHER + name: value for name, value in theirs.items()}
        return found

    def _cut(self, tokenizer: Any, *texts: Any, **how: Any) -> dict[str, Any]:
        """The tokens of a text, at most as many as `max_length` and the tokenizer's own limit allow."""
        if self.args.max_length is not None:
            how = {"truncation": True, "max_length": min(self.args.max_length, tokenizer.model_max_length), **how}
        with call_settings_restored(tokenizer):
            return dict(tokenizer(*texts, **how))

    def padded(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The tokens of some rows as tensors, the teacher's too."""
        batch = pad(self.tokenizer, rows, self.args.pad_to_multiple_of)
        if self.reads_apart:
            theirs = [{name.removeprefix(TEACHER): v for name, v in row.items() if name.startswith(TEACHER)}
                      for row in rows]  # fmt: skip
            found = pad(self.teacher_tokenizer, theirs, self.args.pad_to_multiple_of)
            batch |= {TEACHER + name: value for name, value in found.items()}
        return batch

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor], *, of_teacher: bool = False) -> dict[str, Tensor]:
        """What a model is called with."""
        prefix, reader = "", self.tokenizer
        if of_teacher and self.reads_apart:
            prefix, reader = TEACHER, self.teacher_tokenizer
        names = [name for name in self.input_names(reader) if prefix + name in batch]
        return {name: batch[prefix + name] for name in names if accepts(model, name)}

    def input_names(self, reader: Any) -> Sequence[str]:
        """Names of the tensors in a batch that a model with this tokenizer reads."""
        return reader.model_input_names

    # ---- Losses ----

    @abstractmethod
    def losses(
        self, model: nn.Module, teacher: Any, batch: Mapping[str, Tensor], weight: Float[Tensor, ""]
    ) -> TaskLoss:
        """The loss of a batch.

        Args:
            model: The student as it is wrapped for training.
            teacher: A `LiveTeacher`; None for plain fine-tuning.
            weight: Of each item.

        The passes of both models are made within `viewed`, which `taught` is for the teacher.
        """

    def taught(self, model: nn.Module, teacher: Any, batch: Mapping[str, Tensor]) -> Any:
        """What the teacher returns for a batch, without gradients; None without a teacher."""
        if teacher is None:
            return None
        with self.viewed("teacher", teacher.network), teacher.running(model) as network:
            return network(**self.inputs(network, batch, of_teacher=True))

    @contextmanager
    def viewed(self, role: str, model: nn.Module) -> Iterator[None]:
        """Within the block, the pass of a model leaves what its layers compute in `views`, if a loss compares them.

        Args:
            role: "student" or "teacher".
        """
        if self.views is None or self.between is None:
            yield
            return
        view = self.between.student_viewed if role == "student" else self.between.teacher_viewed
        with view(model) as found:
            yield
        self.views[role] = found

    def between_layers(
        self, model: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor]
    ) -> BetweenLayers | None:
        """The losses between layers of the passes that `losses` has made; None where no loss compares them.

        Args:
            model: The student, unwrapped.
            teacher: The model that runs as the teacher.
        """
        if self.views is None or self.between is None:
            return None
        for role in ("student", "teacher"):
            if role not in self.views:
                raise ValueError(
                    f"`hidden_loss` is set, but the task {type(self).__name__} does not run its {role} within "
                    "`viewed`, so that its layers are not read."
                )
        encoder = self.compared_in_encoder(batch) if self.between.reads("encoder") else None
        views = self.views["student"], self.views["teacher"]
        return self.between(*views, self.compared_tokens(batch), model, teacher, encoder=encoder)

    def compared_tokens(self, batch: Mapping[str, Tensor]) -> ComparedTokens:
        """The tokens whose layers are compared: all but padding, each text with the weight of its items."""
        return tokens_of_texts(batch, self.tokens_read(batch), self.items_of_texts(batch))

    def compared_in_encoder(self, batch: Mapping[str, Tensor]) -> ComparedTokens:
        """The tokens whose layers `side: encoder` compares: all that the encoder reads, weighted as above."""
        return tokens_of_texts(batch, tokens_but_padding(batch), self.items_of_texts(batch))

    def tokens_read(self, batch: Mapping[str, Tensor]) -> Bool[Tensor, "texts length"]:
        """True at the tokens of a batch that `compared_tokens` compares."""
        return tokens_but_padding(batch)

    def items_of_texts(self, batch: Mapping[str, Tensor]) -> Float[Tensor, " texts"]:
        """The number of items in each text of a batch."""
        items = self.items(batch).float()
        return items.flatten(1).sum(1) if items.dim() > 1 else items

    def trained_along(self) -> list[nn.Module]:
        """Parts with weights or state of their own, beside the student: checkpoints hold them, the result does not."""
        return []

    def progress(self, share: float) -> None:
        """Called before each step of training with the share of the steps that is done."""
        return None

    def facts(self) -> dict[str, Any]:
        """What a record is to hold beside the settings."""
        return {}

    # ---- Measurements ----

    @abstractmethod
    def measure(
        self, model: nn.Module, rows: Any, reference: Any = None, *, batch_size: int = 16, dataset: str | None = None
    ) -> list[Measurement]:
        """Measure a model on held-out rows that `prepared` made, and compare it with a reference.

        Args:
            reference: A `LiveTeacher`; None for no comparison.
            dataset: Name of the rows in a report.
        """

    def batches(self, model: nn.Module, rows: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Batches on the model's device, while the model is in evaluation mode and without gradients."""
        device = next(model.parameters()).device
        with torch.no_grad(), evaluation_mode(model):
            waiting: list[Any] = []
            for row in rows:
                waiting.append(row)
                if len(waiting) == batch_size:
                    yield to(device, self.collate(waiting))
                    waiting = []
            if waiting:
                yield to(device, self.collate(waiting))


def tokens_but_padding(batch: Mapping[str, Tensor]) -> Bool[Tensor, "texts length"]:
    """True at the tokens of `input_ids` that are not padding."""
    ids = batch["input_ids"]
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)


def to(device: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def content_of(reader: Any) -> str:
    """All of a tokenizer, or of a processor, that its results depend on."""
    tokenizer = tokenizer_in(reader)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [str(tokenizer) if backend is None else backend.to_str(), str(getattr(reader, "chat_template", None))]
    return "\0".join(parts if tokenizer is reader else [type(reader).__name__, reader.to_json_string(), *parts])


def loss_options(own: Any, name: str) -> list[str]:
    """Names of the options of a task's own loss, or of the divergence of that name."""
    if own is None:
        return own_options(DISTILLATION_LOSSES[name])
    parameters = inspect.signature(own).parameters.values()
    return [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]


def pad(tokenizer: Any, rows: Sequence[Mapping[str, Any]], multiple: int | None) -> dict[str, Tensor]:
    """The inputs of a model in some tokenized rows, padded to one length."""
    inputs = [{name: row[name] for name in tokenizer.model_input_names if name in row} for row in rows]
    return dict(tokenizer.pad(inputs, padding=True, pad_to_multiple_of=multiple, return_tensors="pt"))


#: What two tokenizers are compared on beside their vocabularies.
_PROBE = "A text, with 12 words: naïve, co-operate, it's."


def same_tokens(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers give the same tokens; True where there is no other one."""
    if other is None or other is tokenizer:
        return True
    if tokenizer.get_vocab() != other.get_vocab():
        return False
    with call_settings_restored(tokenizer), call_settings_restored(other):
        return tokenizer(_PROBE)["input_ids"] == other(_PROBE)["input_ids"]


def require_class(model: Any, kind: ModelKind, task: str) -> None:
    """Refuse a model whose class is that of another task.

    Raises:
        ValueError: Its class name ends as those of another task.
    """
    name = type(causal_lm_of(model)).__name__
    endings = {one.suffix for one in MODEL_KINDS.values() if one.suffix.startswith("For")}
    found = next((ending for ending in endings if name.endswith(ending)), None)
    if found is not None and found != kind.suffix:
        raise ValueError(
            f"`task` is {task!r}, but a {name} was given. Load it with {kind.auto_class}, or set the `task` of that "
            "class."
        )
