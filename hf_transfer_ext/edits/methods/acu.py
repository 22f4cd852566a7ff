"""ACU: a head that is fitted in closed form, and that forgets rows exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_transfer_ext.data.question_answer import EncodedAnswer
from hf_transfer_ext.edits.method import Edited, SharedRequests, edit_method
from hf_transfer_ext.edits.subject import Subject
from hf_transfer_ext.merging.method import Interval
from hf_transfer_ext.models.heads import head_module, is_plain_head

#: What the next request needs, beside the model. It holds second moments of the rows' features: do not publish it.
STATE_FILE = "acu_state.safetensors"

#: Of a first fit that sets no others.
GAMMA, MARGIN = 1.0, 10.0

#: Rows that are added or removed at a time.
BLOCK = 512

#: Smallest eigenvalue of I - F R F^T with which rows are removed; below it the rest does not determine the head.
SMALLEST = 1e-9


@dataclass(frozen=True)
class Ridge:
    """A ridge regression that rows can be added to and removed from.

    Args:
        inverse: R = (X^T X + gamma I)^-1.
        weights: W = R X^T Y, one column for each target.
    """

    inverse: Float[Tensor, "features features"]
    weights: Float[Tensor, "features targets"]

    @classmethod
    def empty(cls, features: int, targets: int, gamma: float) -> Ridge:
        """Before any row: R = I / gamma, W = 0."""
        return cls(
            torch.eye(features, dtype=torch.float64) / gamma, torch.zeros(features, targets, dtype=torch.float64)
        )

    def add(self, rows: Float[Tensor, "rows features"], targets: Float[Tensor, "rows targets"]) -> Ridge:
        """The regression with these rows, too."""
        return self._changed(rows, targets, 1.0)

    def remove(self, rows: Float[Tensor, "rows features"], targets: Float[Tensor, "rows targets"]) -> Ridge:
        """The regression as it would be without these rows, which are among those that it was fitted to.

        Raises:
            ValueError: What is left does not determine the weights, or the rows were never added.
        """
        return self._changed(rows, targets, -1.0)

    def _changed(self, rows: Tensor, targets: Tensor, sign: float) -> Ridge:
        inverse, weights = self.inverse, self.weights
        for f, y in zip(rows.split(BLOCK), targets.split(BLOCK), strict=True):
            projected = f @ inverse  # F R
            inner = torch.eye(len(f), dtype=torch.float64) + sign * projected @ f.T
            if sign < 0 and float(torch.linalg.eigvalsh(inner)[0]) < SMALLEST:
                raise ValueError(
                    "The rows to remove cannot be taken out of the fit: they were never a part of it, or `gamma` is "
                    "too small for what is left without them. Check the rows, or fit with a larger `gamma`."
                )
            inverse = inverse - sign * projected.T @ torch.linalg.solve(inner, projected)
            inverse = (inverse + inverse.T) / 2
            weights = weights + sign * inverse @ (f.T @ (y - f @ weights))
        return Ridge(inverse, weights)


@dataclass(frozen=True)
class _State:
    """A fitted head: the regression, the head's rows before it, the tokens, and which answers it was fitted to.

    Args:
        start: Rows of the head for `tokens`, before any fit.
        answers: SHA-256 of each answer that the fit holds (32 bytes each).
    """

    ridge: Ridge
    start: Float[Tensor, "targets features"]
    tokens: Tensor
    answers: list[bytes]
    gamma: float
    margin: float

    def tensors(self) -> dict[str, Tensor]:
        return {
            "inverse": self.ridge.inverse.contiguous(),
            "weights": self.ridge.weights.contiguous(),
            "start": self.start,
            "tokens": self.tokens,
            "answers": _joined(self.answers),
            "settings": torch.tensor([self.gamma, self.margin], dtype=torch.float64),
        }

    @classmethod
    def of(cls, found: Mapping[str, Tensor]) -> _State:
        """The state with these `tensors`."""
        gamma, margin = found["settings"].tolist()
        answers = [bytes(row.tolist()) for row in found["answers"]]
        return cls(Ridge(found["inverse"], found["weights"]), found["start"], found["tokens"], answers, gamma, margin)

    def without(self, removed: _Rows) -> _State:
        """The state as a fit without these answers would have left it.

        Raises:
            ValueError: They are not among those that it was fitted to.
        """
        left = list(self.answers)
        for index, answer in enumerate(removed.answers):
            try:
                left.remove(answer)
            except ValueError:
                raise ValueError(
                    f"Answer {index} of the forget set is not among those that the head was fitted to, or was removed "
                    "before. Rows have to be tokenized as they were in the fit."
                ) from None
        ridge = self.ridge.remove(removed.features, self.targets(removed.tokens))
        return replace(self, ridge=ridge, answers=left)

    def targets(self, tokens: Tensor) -> Float[Tensor, "rows targets"]:
        """`margin` at each row's token."""
        place = torch.searchsorted(self.tokens, tokens.contiguous())
        place = place.clamp(max=len(self.tokens) - 1)
        if not torch.equal(self.tokens[place], tokens):
            raise ValueError("The rows have answer tokens that the fit has not: they were never a part of it.")
        return torch.zeros(len(tokens), len(self.tokens), dtype=torch.float64).scatter_(1, place[:, None], self.margin)


@dataclass(frozen=True)
class _Rows:
    """What a fit reads of answers: the head's inputs and the token at each of them, and SHA-256 of each answer."""

    features: Float[Tensor, "rows features"]
    tokens: Tensor
    answers: list[bytes]

    @classmethod
    def read(cls, subject: Subject, answers: Sequence[EncodedAnswer]) -> _Rows:
        parts = [subject.head_inputs(answer) for answer in answers]
        keys = [hashlib.sha256(repr((one.answer_start, one.input_ids)).encode()).digest() for one in answers]
        return cls(torch.cat([hidden for hidden, _ in parts]), torch.cat([tokens for _, tokens in parts]), keys)

    def tensors(self) -> dict[str, Tensor]:
        return {"features": self.features, "tokens": self.tokens, "answers": _joined(self.answers)}

    @classmethod
    def of(cls, found: Mapping[str, Tensor]) -> _Rows:
        """The rows with these `tensors`."""
        return cls(found["features"], found["tokens"], [bytes(row.tolist()) for row in found["answers"]])


def _joined(digests: Sequence[bytes]) -> Tensor:
    return torch.tensor(list(b"".join(digests)), dtype=torch.uint8).reshape(-1, 32)


def _fitted(subject: Subject, head: Tensor, gamma: float | None, margin: float | None) -> _State:
    """The fit to the forget and the retain rows, before anything is removed."""
    rows = _Rows.read(subject, subject.forget + subject.retain)
    gamma, margin = GAMMA if gamma is None else gamma, MARGIN if margin is None else margin
    known = torch.unique(rows.tokens)
    empty = Ridge.empty(rows.features.shape[1], len(known), gamma)
    state = _State(empty, head[known].double(), known, rows.answers, gamma, margin)
    return replace(state, ridge=empty.add(rows.features, state.targets(rows.tokens)))


def _head(subject: Subject) -> tuple[str, Tensor]:
    """Name and value of the head's weight."""
    head = head_module(subject.live)
    if not is_plain_head(head):
        raise ValueError(f"`acu` needs a plain linear head, got {type(head).__name__}.")
    module = next(name for name, part in subject.live.named_modules() if part is head)
    return f"{module}.weight", head.weight.detach()


def _begun(subject: Subject, *, gamma: float | None = None, margin: float | None = None) -> _State:
    """The state of an earlier edit, if the model has one, or a new fit."""
    _, head = _head(subject)
    path = subject.model.folder / STATE_FILE
    if not path.exists():
        if subject.retain_rows is None:
            raise ValueError("The first `acu` edit of a model fits the head, so it needs rows to retain (`retain`).")
        return _fitted(subject, head, gamma, margin)
    if subject.retain_rows is not None:
        raise ValueError(
            f"{str(subject.model.folder)!r} holds the state of an earlier `acu` edit, which knows the rows that "
            "stay. Leave `retain` out, or delete the state to fit again."
        )
    try:
        state = _State.of(load_file(path))
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} is not the state of an earlier `acu` edit ({error}).") from error
    if state.ridge.inverse.shape[0] != head.shape[1]:
        raise ValueError(
            f"{str(path)!r} belongs to a model of width {state.ridge.inverse.shape[0]}, and this one has "
            f"{head.shape[1]}."
        )
    for name, value, fitted in (("gamma", gamma, state.gamma), ("margin", margin, state.margin)):
        if value not in (None, fitted):
            raise ValueError(
                f"The head was fitted with {name}={fitted:g}, and {name}={value} would have no effect on what is "
                "left of that fit. Leave it out."
            )
    return state


def _edited(subject: Subject, state: _State, removed: int) -> Edited:
    name, _ = _head(subject)
    rows = state.start + state.ridge.weights.T

    def with_rows(weight: Tensor) -> Tensor:
        weight[state.tokens] = rows.float()
        return weight

    found = {"answers_removed": removed, "answers_left": len(state.answers), "tokens": len(state.tokens),
             "gamma": state.gamma, "margin": state.margin}  # fmt: skip
    return Edited({name: subject.edit(name, with_rows)}, found=found)


class _Requests(SharedRequests):
    """Requests share one fit. Each keeps the features and tokens of its own answers, which leave the fit together."""

    def begin(self, subject: Subject, **options: float | None) -> dict[str, Tensor]:
        return _begun(subject, **options).tensors()

    def note(
        self, subject: Subject, shared: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        own = _Rows.read(subject, subject.forget).tensors()
        _without(_State.of(shared), [*others, own])
        return own

    def together(
        self, subject: Subject, shared: Mapping[str, Tensor], noted: Sequence[Mapping[str, Tensor]]
    ) -> Edited:
        return _edited(subject, _without(_State.of(shared), noted), sum(len(one["answers"]) for one in noted))


def _without(state: _State, noted: Sequence[Mapping[str, Tensor]]) -> _State:
    for one in noted:
        state = state.without(_Rows.of(one))
    return state


@edit_method(
    needs=("forget",),
    optional=("retain",),
    ranges={"gamma": Interval(0, open_low=True), "margin": Interval(0)},
    lora=False,
    requests=_Requests(),
)
def acu(subject: Subject, *, gamma: float | None = None, margin: float | None = None) -> Edited:
    r"""Analytic continual unlearning: the head is a ridge regression on frozen features, and rows leave it exactly.

    The inputs x of the head at the positions that predict an answer, and the answer's tokens y, give the head's rows
    for all answer tokens a change D in closed form, on top of the rows W_0 that the model came with:

    .. math:: D = R X^T Y, \quad R = (X^T X + \gamma I)^{-1}, \quad Y = m \cdot \text{onehot}(y), \quad W = W_0 + D^T

    Removing rows F with targets Y_F gives what a fit without them would have given, up to rounding in float64:

    .. math:: R' = R + R F^T (I - F R F^T)^{-1} F R, \qquad D' = D + R' F^T (F D - Y_F)

    The first edit of a model fits the head to forget + retain rows and removes the forget rows. It leaves
    `acu_state.safetensors` beside the model; an edit of *that* model needs the next forget rows only, and no retain
    rows. Any order of requests gives the same head. The state holds second moments of the features of the rows that
    are left, so it is not published with the model.

    `hf-transfer-ext requests` keeps the fit and the features of each request's answers in its own folder instead, so
    that a request can be revoked: the head is then calculated again from the fit and the requests that stand. Features
    tell much about a text, so that folder is as private as the data; the models that it gives hold none of them.

    When to use it: personal data is taught through the head alone (this fit), and deletion requests have to be exact
    and cheap. It undoes nothing that other training has put into the rest of the model, and says so: audit the trunk.

    Args:
        gamma: Ridge, above 0; the larger, the nearer the head stays to W_0. None: 1, or that of the earlier fit.
        margin: m, by how much an answer's token is raised, in logits, from 0 (the fit changes nothing). None: 10, or
            that of the earlier fit.

    Returns:
        A job for the head; that of a model with tied embeddings is written as a tensor of its own.

    Raises:
        ValueError: The first edit has no retain rows, a later one has some or other options; rows that were never
            fitted, or were removed before; no plain head.

    Source: ACU, analytic continual unlearning for efficient and exact forgetting with privacy preservation, 2025,
    https://arxiv.org/abs/2505.12239. The offset W_0 and the margin are this package's own.
    """
    state = _begun(subject, gamma=gamma, margin=margin).without(_Rows.read(subject, subject.forget))
    return replace(_edited(subject, state, len(subject.forget)), files={STATE_FILE: state.tensors()})
