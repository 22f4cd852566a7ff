"""Generate text: answers as text, greedy or sampled; and continuations as tokens, drawn from the model's softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.models.plumbing import pad_token_id


@dataclass(frozen=True)
class GenerationSettings:
    """Settings for generating answers; greedy by default.

    Args:
        max_new_tokens: Maximum number of tokens to generate.
        temperature: 0 for greedy decoding; > 0 samples, with a new seed for each batch, so that samples (unlike all
            other results) depend on the batch size.
        prefix: Text that the answer is forced to begin with (a jailbreak prefix, an empty thought); not part of the
            result.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    prefix: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be >= 0 (0 is greedy), got {self.temperature}.")


class RefuseNaN(LogitsProcessor):
    """Raises an error if the logits are NaN: no token chosen from them says anything about the model."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool(torch.isnan(scores).any()):
            raise ValueError(
                "The model's logits are NaN, so it cannot generate text. Its weights may contain NaN, or its "
                "activations may overflow in this dtype: load it in float32 or bfloat16, or check the checkpoint."
            )
        return scores


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> tuple[list[str], int]:
    """Continue each prompt, padded on the left.

    Returns:
        The generated texts without special tokens, and the number of generated tokens.

    Raises:
        ValueError: The model's logits are NaN.
    """
    pad_id = pad_token_id(tokenizer)
    ids, mask = padded_left(prompts, pad_id, next(model.parameters()).device)
    sampled = settings.temperature > 0
    with torch.random.fork_rng(enabled=sampled):
        if sampled:
            torch.manual_seed(settings.seed)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=settings.max_new_tokens,
            num_beams=1,
            pad_token_id=pad_id,
            do_sample=sampled,
            temperature=settings.temperature if sampled else None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList([RefuseNaN()]),
        )[:, ids.shape[1] :]
    tokens = int((written != pad_id).sum())
    return tokenizer.batch_decode(written, skip_special_tokens=True), tokens


def padded_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """The prompts as one batch that ends where each of them ends, and its attention mask."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(list(prompt))
        mask[i, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens at which generation stops: those of the model's generation config, and the tokenizer's own."""
    named = getattr(causal_lm_of(model).generation_config, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return sorted({token for token in (*named, tokenizer.eos_token_id) if token is not None})


class DrawnLogProbs(LogitsProcessor):
    """Notes the log-probability of each token that is drawn, a step late: only one step's scores are ever held.

    It stands before the temperature, which is applied here as well.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.found: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._note(input_ids[:, -1])
        self._last = scores
        return scores

    def _note(self, drawn: Tensor) -> None:
        if self._last is not None:
            log_probs = (self._last.float() / self.temperature).log_softmax(-1)
            self.found.append(log_probs.gather(1, drawn[:, None]).squeeze(1))

    def of(self, written: Int[Tensor, "batch length"]) -> list[list[float]]:
        """Of each token of `written`, in nats; entries after a row's end say nothing."""
        self._note(written[:, -1])
        self._last = None
        return torch.stack(self.found, 1).tolist()


class TeacherMixture(LogitsProcessor):
    r"""Lets a student and a teacher write together: tokens are drawn from :math:`\alpha p + (1 - \alpha) q`.

    Notes the log-probabilities of each drawn token under both, a step late.

    Args:
        running: Gives the teacher, ready to run; called for each token.
        mask: Attention mask of the prompts, padded on the left.
        share: :math:`\alpha`, the teacher's share of the mixture, in (0, 1).
    """

    def __init__(self, running: Callable[[], AbstractContextManager[Any]], mask: Tensor, share: float) -> None:
        self.running, self.mask, self.share = running, mask, share
        self._cache: Any = None
        self._last: tuple[Tensor, Tensor] | None = None
        self.found: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._note(input_ids[:, -1])
        new = input_ids if self._cache is None else input_ids[:, -1:]
        if self._cache is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(new), 1)], 1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with self.running() as teacher:
            output = teacher(
                input_ids=new, attention_mask=self.mask, position_ids=places, past_key_values=self._cache,
                use_cache=True,
            )  # fmt: skip
        self._cache = output.past_key_values
        logits = output.logits[:, -1, : scores.shape[1]].float()
        logits = torch.nn.functional.pad(logits, (0, scores.shape[1] - logits.shape[1]), value=-torch.inf)
        log_q, log_p = scores.float().log_softmax(-1), logits.log_softmax(-1)
        self._last = log_q, log_p
        return torch.logaddexp(log_p + math.log(self.share), log_q + math.log1p(-self.share))

    def _note(self, drawn: Tensor) -> None:
        if self._last is not None:
            log_q, log_p = (one.gather(1, drawn[:, None]).squeeze(1) for one in self._last)
            self.found.append((log_q, log_p))

    def of(self, written: Int[Tensor, "batch length"]) -> tuple[list[list[float]], list[list[float]]]:
        """(under the student, under the teacher), in nats; entries after a row's end say nothing."""
        self._note(written[:, -1])
        self._last = self._cache = None
        log_q, log_p = (torch.stack(one, 1).tolist() for one in zip(*self.found, strict=True))
        return log_q, log_p


class Continuations(NamedTuple):
    """What was written after some prompts.

    texts: The tokens of each continuation, at least one, without padding.
    tokens: All of them as generated; what stands after the end of a row says nothing.
    ended: Whether a stop token or a stop string ended it, and not `max_new_tokens`.
    """

    texts: list[list[int]]
    tokens: Int[Tensor, "batch length"]
    ended: list[bool]


class _Ends(StoppingCriteria):
    """Notes at which length each row first meets one of `criteria`: padding after it is no token of the text."""

    def __init__(self, criteria: Sequence[StoppingCriteria], prompts: Int[Tensor, "batch length"]) -> None:
        self.criteria, self.start = criteria, prompts.shape[1]
        #: Tokens of each row up to its end; 0 while it goes on.
        self.lengths = prompts.new_zeros(len(prompts))

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        for criterion in self.criteria:
            ends = criterion(input_ids, scores, **kwargs) & (self.lengths == 0)
            self.lengths[ends] = input_ids.shape[1] - self.start
        return self.lengths > 0


@torch.no_grad()
def continuations(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    processors: Sequence[LogitsProcessor] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    **options: Any,
) -> Continuations:
    """Sample a continuation of each prompt with a cache of keys and values; the random state is restored afterward.

    Defaults of the model's own generation config (top_p, a repetition penalty, ...) are left out: tokens are drawn
    from softmax(logits / temperature), unless `options` say otherwise.

    Args:
        stop_ids: Tokens that end a continuation; it includes the one that ended it.
        temperature: > 0.
        seed: Of the draws.
        stop_strings: Texts that end it, too, with the token that completes one of them.
        tokenizer: For `stop_strings`.
        options: Of transformers' `GenerationConfig`.

    Raises:
        ValueError: The model's logits are NaN.
    """
    ids, mask = padded_left(prompts, pad_id, next(model.parameters()).device)
    config = GenerationConfig(
        **{
            "max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0,
            "num_beams": 1, "use_cache": True, "pad_token_id": pad_id, "eos_token_id": list(stop_ids) or None,
            **options,
        }
    )  # fmt: skip
    criteria: list[StoppingCriteria] = [EosTokenCriteria(list(stop_ids))] if stop_ids else []
    if stop_strings:
        criteria.append(StopStringCriteria(tokenizer, list(stop_strings)))
    ends = _Ends(criteria, ids)
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _generating_as(model, config):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([RefuseNaN(), *processors]),
            stopping_criteria=StoppingCriteriaList([ends]),
        )[:, ids.shape[1] :]
    lengths = ends.lengths.tolist()
    texts = [row[: length or None] for row, length in zip(written.tolist(), lengths, strict=True)]
    return Continuations(texts, written, [length > 0 for length in lengths])


@contextmanager
def _generating_as(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own generation config within the block: `generate` falls back on it for every default."""
    holders = [one for one in (model, causal_lm_of(model)) if "generation_config" in vars(one)]
    own = [one.generation_config for one in holders]
    for one in holders:
        one.generation_config = config
    try:
        yield
    finally:
        for one, before in zip(holders, own, strict=True):
            one.generation_config = before
