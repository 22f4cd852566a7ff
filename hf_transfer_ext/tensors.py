"""Named tensor shapes, dtypes by name, and the bookkeeping of next-token losses: shift, mask, sum."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: Labels with this value are ignored; the default of `torch.nn.functional.cross_entropy`.
IGNORE_INDEX = -100

Logits = Float[Tensor, "batch seq vocab"]
PerToken = Float[Tensor, "batch seq"]
Labels = Int[Tensor, "batch seq"]
Mask = Bool[Tensor, "batch seq"]

#: Just under 32 MiB, the largest size of which glibc's malloc takes note.
_NOTED_BYTES = 2**25 - 2**16


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed blocks of up to 32 MiB for the next allocation.

    Temporaries of some megabytes otherwise go back to the kernel as soon as they are freed, and the next ones take a
    page fault for each of their pages: a quarter of the time of a fused loss. malloc keeps blocks of the sizes that
    were freed before (`man mallopt`, M_MMAP_THRESHOLD), so one is allocated and freed here, and never written.
    Other allocators take no notice.
    """
    torch.empty(_NOTED_BYTES, dtype=torch.uint8)


def dtype_by_name(name: Any) -> torch.dtype | None:
    """`"bfloat16"`, `"torch.bfloat16"` or the dtype itself -> `torch.bfloat16`; None if it is not a dtype."""
    if isinstance(name, torch.dtype):
        return name
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def next_token_targets(labels: Int[Tensor, "batch length"]) -> tuple[Labels, Mask]:
    """Shift labels so that position t holds the token that the model predicts at position t: token t + 1.

    Returns:
        targets: `(batch, length - 1)`; IGNORE_INDEX where nothing is predicted.
        mask: True where a token is predicted.
    """
    targets = labels[:, 1:]
    return targets, targets != IGNORE_INDEX


def next_token_view(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> tuple[Logits, Labels, Mask]:
    """Align logits with the tokens they predict: `(logits[:, :-1], labels[:, 1:], mask)`, all `length - 1` long."""
    targets, mask = next_token_targets(labels)
    return logits[:, :-1], targets, mask


def predicting_rows(
    states: Float[Tensor, "batch length size"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "tokens size"]:
    """Hidden states or logits at the positions that predict the chosen tokens, in reading order.

    Args:
        mask: `(batch, length - 1)`, from `next_token_targets`. Prompt-learning adapters put virtual tokens in
            front of a sequence, which makes `states` longer: the last positions belong to the batch itself.
    """
    return states[:, -(mask.shape[1] + 1) : -1][mask.to(states.device)]


def masked_sum(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum over the masked entries. An empty mask gives 0 with a gradient; NaN outside the mask is ignored."""
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over the masked entries; 0 for an empty mask."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)
