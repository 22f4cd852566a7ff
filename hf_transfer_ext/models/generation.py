"""Generate answers: the settings, and greedy or sampled decoding of a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

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
    length = max(len(prompt) for prompt in prompts)
    pad_id = pad_token_id(tokenizer)
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(list(prompt))
        mask[i, length - len(prompt) :] = 1
    sampled = settings.temperature > 0
    with torch.random.fork_rng(enabled=sampled):
        if sampled:
            torch.manual_seed(settings.seed)
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=settings.max_new_tokens,
            num_beams=1,
            pad_token_id=pad_id,
            do_sample=sampled,
            temperature=settings.temperature if sampled else None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList([RefuseNaN()]),
        )[:, length:]
    tokens = int((written != pad_id).sum())
    return tokenizer.batch_decode(written, skip_special_tokens=True), tokens
