"""The model that an edit works on, with the data that it may read: tensors by name, activations, answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_transfer_ext.data.forget_retain import encode_row
from hf_transfer_ext.data.question_answer import EncodedAnswer, QuestionAnswerFormat
from hf_transfer_ext.edits.method import job_of
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.models.heads import head_module
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.models.plumbing import hidden_states, pad_token_id, probing
from hf_transfer_ext.models.scoring import Batch, Scorer
from hf_transfer_ext.weights.dtypes import FLOAT_DTYPES
from hf_transfer_ext.weights.opened import SCALES, InputModel, Scratch

#: Answers that are read in one batch, where the result does not depend on it.
BATCH = 8

Rows = Sequence[Mapping[str, Any]]


def data_digest(rows: Rows) -> str:
    """Hex SHA-256 of rows, as JSON with sorted keys: the same for the same rows, wherever they were read from.

    It names the data without holding it. The digest of something short and guessable can be found by trying.
    """
    text = json.dumps([dict(row) for row in rows], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Linear:
    """A linear layer of the loaded model, and the tensor in which its weight is stored.

    Args:
        tensor: Name of the stored weight.
        transposed: It is stored as `(in, out)` (Conv1D of GPT-2).
    """

    module: str
    tensor: str
    transposed: bool

    def rows_are_outputs(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`function` of a weight `(out, in)`, as a function of the weight as it is stored."""
        return (lambda weight: function(weight.T).T) if self.transposed else function


@dataclass
class Subject:
    """What an edit method gets.

    Args:
        model: The opened model; tensors are read by name, one at a time.
        tuned: The fine-tune or adapter that learned what is to be forgotten.
        forget_rows, retain_rows: Data in any form of `data.forget_retain.row_form`.
        seed: Of whatever a method draws.
    """

    model: InputModel
    tuned: InputModel | None = None
    forget_rows: Rows | None = None
    retain_rows: Rows | None = None
    template: QuestionAnswerFormat = field(default_factory=QuestionAnswerFormat)
    columns: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model.folder)

    @cached_property
    def live(self) -> Any:
        """The whole model in float32, for methods that read activations."""
        if self.model.adapted is not None:
            raise ValueError(
                f"{str(self.model.reference)!r} is an adapter on a model. Merge it into its base first "
                "(`hf-transfer-ext merge` with `passthrough`), and edit the result."
            )
        return load_model(self.model.folder, dtype="float32").eval()

    @cached_property
    def forget(self) -> list[EncodedAnswer]:
        return self._encoded("forget", self.forget_rows)

    @cached_property
    def retain(self) -> list[EncodedAnswer]:
        return self._encoded("retain", self.retain_rows)

    def _encoded(self, name: str, rows: Rows | None) -> list[EncodedAnswer]:
        found = []
        for index, row in enumerate(rows or ()):
            try:
                found += [answer for answer, _ in encode_row(self.tokenizer, row, self.template, self.columns)]
            except (ValueError, TypeError) as error:
                raise ValueError(f"Row {index} of the {name} set cannot be used: {error}") from error
        if not found:
            raise ValueError(f"The {name} set is empty.")
        return found

    def read(self, name: str) -> Float[Tensor, "*shape"]:
        """A whole tensor in float32."""
        tensor = self.model[name]
        values = torch.empty(tensor.shape)
        tensor.read(0, values.view(-1), Scratch())
        return values

    def edit(self, name: str, function: Callable[[Tensor], Tensor]) -> TensorJob:
        """The job that writes `function` of the tensor `name`.

        Raises:
            ValueError: The tensor is quantized, so that its numbers are not the weight.
        """
        tensor = self.model[name]
        if tensor.dtype not in FLOAT_DTYPES or any(name + ending in self.model.tensors for ending in SCALES):
            raise ValueError(
                f"Tensor {name!r} of {str(self.model.reference)!r} is stored as {tensor.dtype} or with scales of its "
                "own. Edit the model with its weights in bfloat16, float16 or float32."
            )
        return job_of(name, tensor, function)

    @cached_property
    def linears(self) -> list[Linear]:
        """All linear layers but the head whose weight is stored as one matrix."""
        head, found = head_module(self.live), []
        for module, part in self.live.named_modules():
            transposed = type(part).__name__ == "Conv1D"
            if part is head or not (isinstance(part, nn.Linear) or transposed):
                continue
            stored = self.model.stored_for(f"{module}.weight")
            if stored is not None and self.model[stored].shape == tuple(part.weight.shape):
                found.append(Linear(module, stored, transposed))
        return found

    def input_norms(self, answers: Sequence[EncodedAnswer]) -> dict[str, Float[Tensor, " inputs"]]:
        """module -> root mean square of each of its input features, over the positions that predict answer tokens."""
        squares: dict[str, Tensor] = {}
        count = 0
        rows: list[Tensor] = []

        def record(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                inputs, mask = arguments[0], rows[-1]
                if inputs.dim() == 2 and len(inputs) == mask.numel():  # a layer that takes all tokens in one row (OPT)
                    mask = mask.reshape(-1)
                inputs = inputs[mask].double()
                squares[name] = squares.get(name, 0.0) + inputs.square().sum(0)  # type: ignore[assignment]

            return hook

        modules = dict(self.live.named_modules())
        hooks = [modules[one.module].register_forward_pre_hook(record(one.module)) for one in self.linears]
        try:
            for batch in self._batches(answers):
                rows.append(batch.rows)
                count += int(batch.rows.sum())
                self.live(**batch.inputs_of(self.live), use_cache=False)
        except IndexError as error:
            raise ValueError(
                "A linear layer of this model does not see the tokens in the order of the batch (routed experts), so "
                "its inputs cannot be told apart by token. Choose layers that do, or another method."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return {name: (one / count).sqrt().float() for name, one in squares.items()}

    def head_inputs(self, answer: EncodedAnswer) -> tuple[Float[Tensor, "tokens hidden"], Tensor]:
        """Inputs of the head at the positions that predict an answer, in float64, and the answer's tokens.

        An answer is read by itself, so that its features do not depend on what it would be batched with.
        """
        (batch,) = self._batches([answer])
        hidden, _ = hidden_states(self.live, **batch.inputs_of(self.live), use_cache=False)
        return hidden[batch.rows].double().detach(), batch.targets

    def _batches(self, answers: Sequence[EncodedAnswer]) -> Iterator[Batch]:
        with probing(self.live):
            for start in range(0, len(answers), BATCH):
                yield Batch.of(answers[start : start + BATCH], pad_token_id(self.tokenizer), self.live.device)


def mean_loss(model: Any, answers: Sequence[EncodedAnswer], pad_id: int) -> float:
    """Negative log-likelihood of the answers' tokens, in nats per token."""
    scorer = Scorer(model, pad_id=pad_id)
    total, tokens = 0.0, 0
    with probing(model):
        for start in range(0, len(answers), BATCH):
            for scores in scorer.score(answers[start : start + BATCH], frozenset()):
                total, tokens = total - float(scores.log_probs.sum()), tokens + len(scores.log_probs)
    return total / tokens


@contextmanager
def closing(*models: InputModel | None) -> Iterator[None]:
    """Close opened models at the end of the block."""
    try:
        yield
    finally:
        for model in models:
            if model is not None:
                model.close()
