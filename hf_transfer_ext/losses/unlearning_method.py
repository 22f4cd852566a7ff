"""What a published unlearning method is: two losses, their weights, and what it does beside minimizing their sum.

A method is a subclass of `Method` in a file of its own under `methods/`, named like the file. Most only set class
attributes. One that does more overrides a function below; the trainer calls them and knows no method by name.

- Options of its own are fields of the class (`@dataclass(frozen=True)`), set by `method_options` in the config.
- A schedule, or weights that are learned: `weights`, `start` and `learn`.
- A step of its own (two gradients combined, moved weights, a mask on gradients): `gradient`.
- Tensors computed once, such as a mask: `prepare`.
- Where alternative answers come from: `alternatives`. Other rows than the given ones: `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from hf_transfer_ext.data.question_answer import EncodedAnswer
from hf_transfer_ext.data.unlearning.alternatives import Write
from hf_transfer_ext.losses.needs import ForwardPass, check_options
from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES, UNLEARNING_LOSSES
from hf_transfer_ext.registry import unknown_name

Part = Literal["forget", "retain"]

#: Where alternative answers can come from -> what they are.
ALTERNATIVES = {
    "refusals": "built-in refusals, or the texts given as `alternatives`; a row's own column 'alternative' goes first",
    "data": "each row's own column 'alternative': a text, or a list of texts",
    "sampled": "answers that the model itself writes before training; a row's own column 'alternative' goes first",
    "reasoned refusals": "chains of thought about the question that end in a refusal; a row's own column goes first",
    "misleading rationales": "wrong answers, each after a rationale that the model writes for it before training; a "
    "row's own column 'alternative' goes first",
    "forget answers": "the answers to other questions of the forget set",
    "retain answers": "the answers to questions of the retain set",
    "nearest answers": "the answer to the question of the retain set that has most words in common with the row's own",
}

#: One tensor for each trained parameter, in the order of the model's parameters.
Gradient: TypeAlias = list[Tensor]


@dataclass(frozen=True)
class Progress:
    """How far the training is.

    Args:
        share: Steps done of all steps, from 0 to 1.
        epoch: Passes over the forget set, with a fraction.
    """

    share: float
    epoch: float


@runtime_checkable
class Batch(Protocol):
    """One micro-batch of a step, for what a method does around its forward and backward pass."""

    def recall(self) -> Tensor:
        """Mean negative log-likelihood of the answers to forget, in nats per token, with its graph."""
        ...

    def hidden_states_changed(self, layer: int, change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Within the block, the trained model's layer gives `change(hidden)`; the reference is as ever."""
        ...


@runtime_checkable
class Step(Protocol):
    """One optimizer step, as a method with a step of its own sees it: all its micro-batches, on all processes."""

    @property
    def gamma(self) -> float:
        """Weight of the forget loss."""
        ...

    @property
    def alpha(self) -> float:
        """Weight of the retain loss."""
        ...

    @property
    def progress(self) -> Progress:
        """How far the training is."""
        ...

    @property
    def layers(self) -> int:
        """Number of the model's decoder layers."""
        ...

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters."""
        ...

    @property
    def prepared(self) -> Mapping[str, Tensor]:
        """What `Method.prepare` gave."""
        ...

    def gradient(self, part: Part, around: Callable[[Batch], AbstractContextManager] | None = None) -> Gradient:
        """Gradient of the mean forget or retain loss of the step, not weighted; one more pass over its batches.

        Args:
            around: Entered around the forward and backward pass of each batch.
        """
        ...

    def recall(self) -> Gradient:
        """Gradient of the mean negative log-likelihood of the answers to forget; relearning goes against it."""
        ...

    def answers(
        self, part: Part, *, at_once: int = 1, layer: int = 0, change: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[ForwardPass]:
        """A forward pass, without dropout and with its graph, over the answers of a whole set, in the set's order.

        It keeps the hidden states of `hidden_layer`, where the config sets one. Each process gets all of them.

        Args:
            at_once: Answers in a pass, >= 1; one alone is not padded.
            layer: With `change`, the layer that gives `change(hidden)`, from 1.
        """
        ...

    def copies(self) -> Iterator[tuple[EncodedAnswer, list[tuple[list[int], int, Tensor]]]]:
        """Each answer to forget, and the copies that `Method.copies` made of it: token ids, where the answer starts,
        and the model's logits at the answer's tokens."""
        ...

    def moved(self, by: Gradient) -> AbstractContextManager[None]:
        """Within the block, the trained parameters are larger by `by`; afterwards they are exactly as before."""
        ...

    def rounded(self, bits: int, block: int) -> AbstractContextManager[None]:
        """Within the block, the trained model computes with rounded weights; gradients pass through the rounding."""
        ...


@dataclass(frozen=True)
class Method:
    """A published way to unlearn: minimize `gamma * forget + alpha * retain`, with the weights of its authors.

    Class attributes:
        forget: Name of an unlearning loss.
        retain: Name of a retain loss; None for no retain loss.
        gamma: Weight of the forget loss, >= 0.
        alpha: Weight of the retain loss, >= 0.
        forget_options: Options of the forget loss that differ from its defaults.
        alternatives: Where the alternative answers of losses that ask for them come from: a name of `ALTERNATIVES`.
        sets: Weights ("gamma", "alpha") that the method computes itself, so that a config cannot set them.
        requires_retain: Whether the method makes no sense without a retain loss.
    """

    forget: ClassVar[str]
    retain: ClassVar[str | None] = None
    gamma: ClassVar[float] = 1.0
    alpha: ClassVar[float] = 1.0
    forget_options: ClassVar[Mapping[str, Any]] = {}
    alternatives: ClassVar[str] = "refusals"
    sets: ClassVar[tuple[str, ...]] = ()
    requires_retain: ClassVar[bool] = False

    def check(self, config: Any) -> None:
        """Refuse settings of the config that the method cannot work with, by a ValueError."""

    def start(self) -> dict[str, float]:
        """Values that the method learns, before the first step; saved in checkpoints, and logged by these names."""
        return {}

    def weights(
        self, gamma: float, alpha: float, progress: Progress, learned: Mapping[str, float]
    ) -> tuple[float, float]:
        """Weights (gamma, alpha) of the coming step, from those of the config."""
        return gamma, alpha

    def learn(
        self, learned: Mapping[str, float], losses: Mapping[Part, float], progress: Progress
    ) -> dict[str, float]:
        """Learned values after a step whose mean losses, over all micro-batches and processes, were `losses`."""
        return dict(learned)

    def rows(
        self,
        forget: Sequence[Mapping[str, Any]],
        retain: Sequence[Mapping[str, Any]],
        columns: Mapping[str, str],
        write: Write,
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """The rows to train on, made from those that were given (no retain rows: none were).

        Args:
            write: The model as it is before training, as a function that answers questions.
        """
        return forget, retain

    def copies(
        self, forget: Sequence[Mapping[str, Any]], retain: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
    ) -> list[list[dict[str, Any]]]:
        """Changed copies of each row to forget, which `prepare` can run the model on (`Step.copies`)."""
        return []

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        """Tensors computed once before the first step, and saved in checkpoints.

        Args:
            whole: A step whose batches are all of the forget set, each with its retain samples.
        """
        return {}

    def gradient(self, step: Step) -> Gradient:
        """What the optimizer gets: the gradient of `gamma * forget + alpha * retain`, unless overridden.

        The trainer calls this only where a method overrides it; otherwise both losses share one backward pass.
        """
        return weighted_sum(step, step.gradient("forget"), step.gradient("retain"))

    @classmethod
    def has_own_step(cls) -> bool:
        return cls.gradient is not Method.gradient

    @classmethod
    def has_own_rows(cls) -> bool:
        return cls.rows is not Method.rows


def weighted_sum(step: Step, forget: Gradient, retain: Gradient) -> Gradient:
    """gamma * forget + alpha * retain."""
    return [step.gamma * f + step.alpha * r for f, r in zip(forget, retain, strict=True)]


def norm(gradient: Gradient) -> Tensor:
    """Euclidean length of all tensors of a gradient together, in float32."""
    return torch.stack([g.float().square().sum() for g in gradient]).sum().sqrt()


def method_from_options(method: type[Method], options: Mapping[str, Any]) -> Method:
    """A method with its own options; an option that it does not have, or a value out of range, is refused."""
    known = [f.name for f in fields(method)]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of {method.__name__}", option, known or ["(it has none)"]))
    return method(**options)


def check_method(method: Any) -> None:
    """Refuse what the trainer could not use as a method; the registry checks this when a method is registered."""
    name = getattr(method, "__name__", repr(method))
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ValueError(f"The unlearning method {name!r} has to be a subclass of `Method`, got {type(method)}.")
    if not hasattr(method, "forget"):
        raise ValueError(f"The unlearning method {name!r} has to name its forget loss: `forget = ...`.")
    for attribute, registry in (("forget", UNLEARNING_LOSSES), ("retain", RETAIN_LOSSES)):
        loss = getattr(method, attribute)
        if (loss is not None or attribute == "forget") and loss not in registry:
            raise ValueError(f"In the unlearning method {name!r}: {unknown_name(registry.kind, loss, registry)}")
    check_options(UNLEARNING_LOSSES[method.forget], method.forget_options)
    if method.alternatives not in ALTERNATIVES:
        raise ValueError(
            f"In the unlearning method {name!r}: "
            f"{unknown_name('source of alternatives', method.alternatives, ALTERNATIVES)}"
        )
    if "__annotations__" in vars(method) and "__dataclass_fields__" not in vars(method):
        raise ValueError(f"Mark the unlearning method {name!r} with `@dataclass(frozen=True)`: it has options.")
    try:
        method()
    except TypeError as error:
        raise ValueError(f"Each option of the unlearning method {name!r} needs a default: {error}.") from error
