"""One teacher-forced pass over a batch of sequences that computes all the scores metrics need, in token chunks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from hf_transfer_ext.data.question_answer import EncodedAnswer
from hf_transfer_ext.models.heads import vocabulary_size
from hf_transfer_ext.models.plumbing import (
    RowLogits,
    active_adapter,
    attention_span,
    head_is_understood,
    hidden_states,
    is_sharded,
    output_head,
)
from hf_transfer_ext.models.sample_gradients import UnknownUse, gradient_norms
from hf_transfer_ext.tensors import IGNORE_INDEX

logger = logging.getLogger(__name__)

#: Maximum number of logits in memory (16 MB of float32): the chunks of tokens are sized to fit, for any vocabulary.
LOGITS_AT_ONCE = 1 << 22
#: On a GPU the limit is multiplied by this, since larger matrix products are more efficient there.
GPU_FACTOR = 16
#: Maximum number of tokens, padding included, whose activations a backward pass for several sequences stores.
GRADIENT_TOKENS = 2048
#: Maximum number of logits of such a pass (64 MB of float32). One sequence is never split, whatever its size.
GRADIENT_LOGITS = 1 << 24
#: Minimum prompt length in tokens, without the last one, for which answers to one prompt share a row.
SHORTEST_SHARED_PROMPT = 4
#: Maximum length of a shared row in tokens, unless one answer alone is longer: its mask grows quadratically.
LONGEST_SHARED_ROW = 1024


@dataclass
class TokenScores:
    """Per-token scores of an answer from one forward pass; arrays are as long as the answer.

    Args:
        log_probs: Natural logarithm of the token's probability.
        first_choice: Whether the token was the most probable one.
        vocabulary_mean: Mean of log p over the vocabulary, weighted by p: the negative entropy, in nats.
        vocabulary_std: Standard deviation of log p over the vocabulary, weighted by p, in nats.
        reference_log_probs: Like `log_probs`, under the reference.
        reference_kl: KL(reference || model), in nats.
        reference_agrees: Whether reference and model have the same first choice.
        gradient_norm: L2 norm of the gradient of the answer's mean loss, in nats per unit of weight.
        hidden: Hidden state at the last token before the answer, after the embedding and after each layer.
    """

    log_probs: np.ndarray
    first_choice: np.ndarray
    vocabulary_mean: np.ndarray | None = None
    vocabulary_std: np.ndarray | None = None
    reference_log_probs: np.ndarray | None = None
    reference_kl: np.ndarray | None = None
    reference_agrees: np.ndarray | None = None
    gradient_norm: float | None = None
    hidden: np.ndarray | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return float(-self.log_probs.mean())

    def __len__(self) -> int:
        return len(self.log_probs)

    def known(self, name: str) -> np.ndarray:
        """The quantity with this name, which the metric must have declared among its needs."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"`{name}` was not scored. The metric that reads it must declare the need for it.")
        return value

    def has(self, needs: frozenset[str]) -> bool:
        """Whether all needed quantities are known; `generations` are not part of this class and are ignored."""
        known = {
            "token_log_probs": self.log_probs,
            "vocabulary_moments": self.vocabulary_mean,
            "reference": self.reference_kl,
            "gradients": self.gradient_norm,
            "hidden_states": self.hidden,
        }
        return all(known[need] is not None for need in needs if need in known)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable values; unknown quantities are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items() if v is not None}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TokenScores:
        arrays: dict[str, Any] = {k: np.asarray(v) if isinstance(v, list) else v for k, v in values.items()}
        return TokenScores(**arrays)


@dataclass
class ScoredExample:
    """One example with all its scores.

    Args:
        index: Index of the example in the input data.
        example: The example itself, with the column names of the schema.
        texts: column -> scores, one per text of the column ("perturbed_answer" has several).
        sequences: Like `texts`, with the tokens.
        generation: What the model wrote after the prompt, without special tokens.
    """

    index: int
    example: dict[str, Any]
    texts: dict[str, list[TokenScores]] = field(default_factory=dict)
    sequences: dict[str, list[EncodedAnswer]] = field(default_factory=dict)
    generation: str | None = None

    @property
    def answer(self) -> TokenScores:
        return self.texts["answer"][0]

    @property
    def paraphrase(self) -> TokenScores:
        """The paraphrased answer, or the answer itself if the data has no paraphrase (as TOFU does)."""
        return self.texts.get("paraphrased_answer", self.texts["answer"])[0]


@torch.no_grad()
def prompts_can_be_shared(model: Any) -> bool:
    """Whether `Batch.sharing` reproduces the model's logits, tested on two answers to one prompt.

    Models that do not accept a custom mask (recurrent ones, ALiBi, flash attention) process each sequence separately.
    """
    if is_sharded(model):
        return False
    parameter = next(iter(model.parameters()))
    ids = [(at * 7 + 1) % vocabulary_size(model) for at in range(11)]
    sequences = [EncodedAnswer(ids[:8], 6), EncodedAnswer([*ids[:6], *ids[8:]], 6)]
    try:
        apart, shared = [
            torch.log_softmax(model(**batch.inputs_of(model), use_cache=False).logits[batch.rows].float(), -1)
            for batch in (make(sequences, ids[0], parameter.device) for make in (Batch.of, Batch.sharing))
        ]
    except (AttributeError, TypeError, ValueError, NotImplementedError, IndexError, RuntimeError):
        return False
    allowed = (1e-3 if parameter.dtype == torch.float32 else 3e-2) * max(1.0, float(apart.std()))
    return apart.shape == shared.shape and bool((apart - shared).abs().max() <= allowed)


def _norm(gradient: Tensor) -> Float[Tensor, ""]:
    return torch.linalg.vector_norm(gradient.detach(), dtype=torch.promote_types(gradient.dtype, torch.float32))


def _unchanged(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """The head of rows that are logits already."""
    return logits


def _row_products(first: RowLogits, second: RowLogits) -> Float[Tensor, " rows"]:
    """Row-wise inner products, without a temporary for the elementwise products."""
    return torch.bmm(first[:, None], second[:, :, None])[:, 0, 0]


@dataclass
class Batch:
    """Sequences of one forward pass, padded on the right; `rows` picks the positions that predict answer tokens.

    Args:
        input_ids: `(batch, length)`.
        attention_mask: `(batch, length)`, 0 for padding; if rows share a prompt, which tokens each token attends to,
            `(batch, 1, length, length)`.
        position_ids: `(batch, length)` if rows share a prompt, else None, for consecutive positions.
        rows: `(batch, length)`; in reading order, the positions of the answers, sequence by sequence as in `order`.
        targets: The tokens of the answers, in that order.
        order: Indices of the sequences in the input list.
        starts: For each sequence of `order`, row and column of the last token before its answer.
        tokens: Number of input tokens, without padding.
    """

    input_ids: Int[Tensor, "batch length"]
    attention_mask: Tensor
    position_ids: Int[Tensor, "batch length"] | None
    rows: Bool[Tensor, "batch length"]
    targets: Int[Tensor, " rows"]
    order: list[int]
    starts: list[tuple[int, int]]
    tokens: int

    @property
    def length(self) -> int:
        return self.rows.shape[1]

    def inputs_of(self, model: Any) -> dict[str, Tensor]:
        """Keyword arguments of the model; a custom mask is additive, in the model's dtype."""
        if self.position_ids is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        dtype = next(iter(model.parameters())).dtype
        added = torch.zeros(self.attention_mask.shape, dtype=dtype, device=self.attention_mask.device)
        added.masked_fill_(~self.attention_mask, torch.finfo(dtype).min)
        return {"input_ids": self.input_ids, "attention_mask": added, "position_ids": self.position_ids}

    @staticmethod
    def of(sequences: Sequence[EncodedAnswer], pad_id: int, device: Any) -> Batch:
        """One sequence per row."""
        length = max(len(s.input_ids) for s in sequences)
        ids = torch.full((len(sequences), length), pad_id)
        mask, rows = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, s in enumerate(sequences):
            ids[i, : len(s.input_ids)] = torch.tensor(s.input_ids)
            mask[i, : len(s.input_ids)] = 1
            rows[i, s.answer_start - 1 : len(s.input_ids) - 1] = True
        targets = torch.cat([torch.tensor(s.input_ids[s.answer_start :]) for s in sequences])
        starts = [(i, s.answer_start - 1) for i, s in enumerate(sequences)]
        order = list(range(len(sequences)))
        ids, mask, rows, targets = (tensor.to(device) for tensor in (ids, mask, rows, targets))
        return Batch(ids, mask, None, rows, targets, order, starts, int(mask.sum()))

    @staticmethod
    def sharing(sequences: Sequence[EncodedAnswer], pad_id: int, device: Any) -> Batch:
        """Answers to one prompt share a row, so that the prompt is processed once; no answer attends to another.

        A row is the prompt without its last token, then, for each answer, that token and the answer without its last
        token, which predicts nothing. The positions of each answer continue from the prompt.
        """
        groups = groups_of(sequences)
        prompts = [list(sequences[group[0]].input_ids[: sequences[group[0]].answer_start - 1]) for group in groups]
        branches = [[sequences[i].input_ids[sequences[i].answer_start - 1 : -1] for i in group] for group in groups]
        lengths = [len(p) + sum(map(len, parts)) for p, parts in zip(prompts, branches, strict=True)]
        ids = torch.full((len(groups), max(lengths)), pad_id)
        positions, rows = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        seen = torch.eye(max(lengths), dtype=torch.bool).repeat(len(groups), 1, 1)  # [query, key], also for padding
        starts: list[tuple[int, int]] = []
        for g, (prompt, parts) in enumerate(zip(prompts, branches, strict=True)):
            shared = at = len(prompt)
            ids[g, :shared] = torch.tensor(prompt)
            positions[g, :shared] = torch.arange(shared)
            seen[g, :shared, :shared] = torch.ones(shared, shared, dtype=torch.bool).tril()
            for part in parts:
                own = slice(at, at + len(part))
                ids[g, own], rows[g, own] = torch.tensor(part), True
                positions[g, own] = torch.arange(shared, shared + len(part))
                seen[g, own, :shared] = True
                seen[g, own, own] = torch.ones(len(part), len(part), dtype=torch.bool).tril()
                starts.append((g, at))
                at += len(part)
        order = [i for group in groups for i in group]
        targets = torch.cat([torch.tensor(sequences[i].input_ids[sequences[i].answer_start :]) for i in order])
        ids, positions, rows, targets, seen = (x.to(device) for x in (ids, positions, rows, targets, seen[:, None]))
        return Batch(ids, seen, positions, rows, targets, order, starts, sum(lengths))


def groups_of(sequences: Sequence[EncodedAnswer]) -> list[list[int]]:
    """Indices of the sequences that share a row: those with the same prompt if it is long enough, up to a full row."""
    groups: list[list[int]] = []
    open_row: dict[tuple[int, ...], tuple[list[int], int]] = {}  # prompt -> its row, and that row's length
    for i, s in enumerate(sequences):
        prompt = tuple(s.input_ids[: s.answer_start])
        row, tokens = open_row.get(prompt, ([], 0))
        if not row or tokens + s.answer_length > LONGEST_SHARED_ROW:
            row, tokens = [], s.answer_start - 1
            groups.append(row)
        row.append(i)
        if s.answer_start - 1 >= SHORTEST_SHARED_PROMPT:
            open_row[prompt] = row, tokens + s.answer_length
    return groups


def gradient_groups(sequences: Sequence[EncodedAnswer], vocabulary: int) -> list[int]:
    """Sizes of consecutive groups of sequences whose activations and logits may exist at once in a backward pass."""
    sizes: list[int] = []
    length = answer = 0
    for s in sequences:
        length, answer = max(length, len(s.input_ids)), max(answer, s.answer_length)
        size = sizes[-1] + 1 if sizes else 1
        if sizes and size * length <= GRADIENT_TOKENS and size * answer * vocabulary <= GRADIENT_LOGITS:
            sizes[-1] = size
        else:
            sizes.append(1)
            length, answer = len(s.input_ids), s.answer_length
    return sizes


class Scorer:
    """Scores batches with a model and, if needed, a reference.

    Args:
        model: Causal language model or PeftModel, on its device, in eval mode.
        reference: Another model, or the name of an adapter of `model` ("base" for its base model); None for none.
        adapter: Adapter of `model` to evaluate; None for the active one.
        pad_id: Token id for padding on the right (masked).
    """

    def __init__(self, model: Any, *, reference: Any = None, adapter: str | None = None, pad_id: int = 0) -> None:
        self.model, self.adapter, self.pad_id = model, adapter, pad_id
        self.reference_model = model if isinstance(reference, str) else reference
        self.reference_adapter = reference if isinstance(reference, str) else None
        self.forward_tokens = 0
        self.forwards = 0
        self._faithful: dict[int, bool] = {}
        self._shares: dict[int, bool] = {}
        self._batches_gradients: bool | None = None  # None until the first batch has been verified

    def score(self, sequences: Sequence[EncodedAnswer], needs: frozenset[str]) -> list[TokenScores]:
        """Score each sequence once for all `needs`, in as few passes as the model and `GRADIENT_TOKENS` allow."""
        together = all(map(self.splits, self._models(needs)))
        if together and "gradients" not in needs:
            return self._score_group(list(sequences), needs)
        references: list[Any] = [None] * len(sequences)
        if "reference" in needs and self.splits(self.reference_model):
            references = self._reference_rows(sequences)  # needs no gradient, so all at once
        sizes = [1] * len(sequences)
        if "gradients" in needs and together and self._batches_gradients is not False:
            sizes = gradient_groups(sequences, vocabulary_size(self.model))
        scored: list[TokenScores] = []
        for size in sizes:
            own = slice(len(scored), len(scored) + size)
            try:
                scored += self._score_group(list(sequences[own]), needs, references[own])
                if size > 1 and self._batches_gradients is None:
                    self._verify_gradients(sequences[own], scored[own])
            except UnknownUse as reason:
                logger.warning(
                    "Gradient norms are computed with one backward pass per sequence, since they cannot be batched "
                    "for %s: %s.", type(self.model).__name__, reason,
                )  # fmt: skip
                self._batches_gradients = False
                return self.score(sequences, needs)
        return scored

    def _verify_gradients(self, sequences: Sequence[EncodedAnswer], scores: Sequence[TokenScores]) -> None:
        """Compare the norm of the shortest sequence of a batch with that of the sequence by itself.

        Raises:
            UnknownUse: They differ by more than rounding: the model's samples depend on each other.
        """
        place = min(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
        alone = self._score_group([sequences[place]], frozenset({"token_log_probs", "gradients"}))[0].gradient_norm
        batched, half = scores[place].gradient_norm, next(iter(self.model.parameters())).dtype.itemsize < 4
        if alone is None or batched is None or not abs(batched - alone) <= (5e-2 if half else 1e-3) * alone:
            raise UnknownUse(f"a sequence has the norm {batched} in a batch, and {alone} by itself")
        self._batches_gradients = True

    def _models(self, needs: frozenset[str]) -> list[Any]:
        return [self.model, self.reference_model] if "reference" in needs else [self.model]

    def splits(self, model: Any) -> bool:
        """Whether hidden states and head can be computed separately; if not, full logits of one sequence at a time."""
        if id(model) not in self._faithful:
            self._faithful[id(model)] = not is_sharded(model) and head_is_understood(model, plain=False)
        return self._faithful[id(model)]

    def shares_prompts(self, model: Any) -> bool:
        """Whether answers to one prompt can share a row."""
        if id(model) not in self._shares:
            self._shares[id(model)] = prompts_can_be_shared(model)
        return self._shares[id(model)]

    def _reference_rows(self, sequences: Sequence[EncodedAnswer]) -> list[tuple[Any, Any]]:
        """(rows, head) of the reference for each sequence, from one pass over all of them."""
        batch = self._batch_of(sequences, [self.reference_model])
        with torch.no_grad():
            rows, head, _ = self._rows(self.reference_model, self.reference_adapter, batch, False)
        parts = rows.split([sequences[place].answer_length for place in batch.order])
        found = dict(zip(batch.order, parts, strict=True))
        return [(found[place], head) for place in range(len(sequences))]

    def _batch_of(self, sequences: Sequence[EncodedAnswer], models: Sequence[Any]) -> Batch:
        device = next(iter(models[0].parameters())).device
        longest = max(len(s.input_ids) for s in sequences)
        if (
            len(groups_of(sequences)) < len(sequences)
            and longest <= min(attention_span(model) for model in models)
            and all(self.shares_prompts(model) for model in models)
        ):
            return Batch.sharing(sequences, self.pad_id, device)
        return Batch.of(sequences, self.pad_id, device)

    def _rows(self, model: Any, adapter: str | None, batch: Batch, every_layer: bool) -> tuple[Any, Any, Any]:
        """(rows, head, all hidden states): rows of hidden states with their head, or rows of logits with none."""
        self.forwards += 1
        self.forward_tokens += batch.tokens
        inputs = {**batch.inputs_of(model), "use_cache": False}
        with active_adapter(model, adapter):
            # Prompt-learning adapters put virtual tokens in front: the last columns belong to the batch itself.
            own = slice(-batch.length, None)
            if self.splits(model):
                hidden, output = hidden_states(model, **inputs, output_hidden_states=every_layer)
                return hidden[:, own][batch.rows], output_head(model), output.hidden_states
            output = model(**inputs, output_hidden_states=every_layer)
            return output.logits[:, own][batch.rows].float(), _unchanged, output.hidden_states

    def _score_group(
        self, sequences: list[EncodedAnswer], needs: frozenset[str], references: Sequence[Any] = (None,)
    ) -> list[TokenScores]:
        """Score sequences in one pass; `references` holds rows and head of each if they are already known."""
        every_layer = "hidden_states" in needs
        norms: list[float | None] = [None] * len(sequences)
        if "gradients" in needs:
            batch = Batch.of(sequences, self.pad_id, next(iter(self.model.parameters())).device)
            rows, hidden, norms = self._logits_and_norms(sequences, batch, every_layer)
            head = _unchanged
        else:
            batch = self._batch_of(sequences, self._models(needs))
            with torch.no_grad():
                rows, head, hidden = self._rows(self.model, self.adapter, batch, every_layer)
        rows = rows.detach()
        reference_rows = reference_head = None
        if None not in references:
            reference_rows, reference_head = torch.cat([known[0] for known in references]), references[0][1]
        with torch.no_grad():
            if "reference" in needs and reference_rows is None:
                reference_rows, reference_head, _ = self._rows(
                    self.reference_model, self.reference_adapter, batch, False
                )
            parts = self._scan(rows, head, batch.targets, needs, reference_rows, reference_head)
        scored: dict[int, TokenScores] = {}
        end = 0
        for place, (row, column) in zip(batch.order, batch.starts, strict=True):
            start, end = end, end + sequences[place].answer_length
            scores = TokenScores(**{name: values[start:end] for name, values in parts.items()})  # type: ignore[arg-type]
            scores.gradient_norm = norms[place]
            if hidden is not None and "hidden_states" in needs:
                states = [layer[row, column - batch.length] for layer in hidden]
                scores.hidden = torch.stack(states).detach().float().cpu().numpy()
            scored[place] = scores
        return [scored[place] for place in range(len(sequences))]

    def _scan(
        self, rows: Any, head: Any, targets: Any, needs: frozenset[str], reference_rows: Any, reference_head: Any
    ) -> dict[str, np.ndarray]:
        """All per-token quantities; at most `LOGITS_AT_ONCE` logits exist at a time (`GPU_FACTOR` on a GPU)."""
        allowed = LOGITS_AT_ONCE * (GPU_FACTOR if targets.is_cuda else 1)
        step = max(1, allowed // vocabulary_size(self.model))
        parts: dict[str, Tensor] = {}
        for at in range(0, len(targets), step):
            own = slice(at, at + step)
            reference = None if reference_rows is None else (reference_rows[own], reference_head)
            for name, values in self._scan_chunk(rows[own], head, targets[own], needs, reference).items():
                if name not in parts:  # one array for all chunks: many small ones would fragment the heap
                    kind = torch.float64 if values.is_floating_point() else values.dtype
                    parts[name] = torch.empty(len(targets), dtype=kind)
                parts[name][own] = values.cpu()
        return {name: values.numpy() for name, values in parts.items()}

    def _scan_chunk(
        self, rows: Any, head: Any, target: Any, needs: frozenset[str], reference: tuple[Any, Any] | None
    ) -> dict[str, Tensor]:
        """The scores of a few tokens. Tensors as large as the logits are overwritten when no longer needed."""
        # If an adapter changes the head, its head must run with this adapter active.
        with active_adapter(self.model, self.adapter):
            log_p = head(rows).log_softmax(-1)
        first = log_p.argmax(-1)
        found = {"log_probs": log_p.gather(-1, target[:, None])[:, 0], "first_choice": first == target}
        if reference is not None:
            with active_adapter(self.reference_model, self.reference_adapter):
                log_q = reference[1](reference[0]).log_softmax(-1).to(log_p.device)
            if log_q.shape != log_p.shape:
                raise ValueError(
                    f"Model and reference need the same vocabulary: {log_p.shape[-1]} and {log_q.shape[-1]} entries."
                )
            found["reference_log_probs"] = log_q.gather(-1, target[:, None])[:, 0]
            found["reference_agrees"] = first == log_q.argmax(-1)
            q = log_q.exp()
            found["reference_kl"] = _row_products(q, log_q.sub_(log_p).masked_fill_(q == 0, 0.0))
            del q, log_q
        if "vocabulary_moments" in needs:
            p = log_p.exp()
            log_p.masked_fill_(p == 0, 0.0)  # 0 log 0 = 0
            mean = _row_products(p, log_p)
            found["vocabulary_mean"] = mean
            found["vocabulary_std"] = _row_products(p, log_p.sub_(mean[:, None]).square_()).sqrt()
        return found

    def _logits_and_norms(
        self, sequences: Sequence[EncodedAnswer], batch: Batch, every_layer: bool
    ) -> tuple[Any, Any, list[float | None]]:
        """(rows of logits, all hidden states, gradient norm of each sequence's mean loss); one sequence per row."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if not weights:
            raise ValueError(
                "Gradient norms need weights with requires_grad=True, and this model has none. "
                "Unfreeze the weights to take the norm over."
            )
        lengths = [s.answer_length for s in sequences]
        found: list[Any] = []

        def losses() -> Tensor:
            rows, head, hidden = self._rows(self.model, self.adapter, batch, every_layer)
            rows = pad_sequence(rows.split(lengths), batch_first=True)
            targets = pad_sequence(batch.targets.split(lengths), batch_first=True, padding_value=IGNORE_INDEX)
            with active_adapter(self.model, self.adapter) if self.adapter else nullcontext():
                logits = head(rows)
            found[:] = [logits.detach()[targets != IGNORE_INDEX], hidden]
            per_token = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            return per_token.view(targets.shape).sum(1) / torch.tensor(lengths, device=per_token.device)

        with torch.enable_grad():
            if len(sequences) > 1:
                norms = gradient_norms(weights, losses, samples=len(sequences), length=batch.length).tolist()
            else:
                gradients = torch.autograd.grad(losses().sum(), weights, allow_unused=True)
                norms = [float(torch.stack([_norm(g) for g in gradients if g is not None]).norm())]
        return found[0], found[1], norms
