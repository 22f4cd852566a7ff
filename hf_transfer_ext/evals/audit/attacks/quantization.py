from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.subject import AuditData, Subject, merged_adapter, restored_weights
from hf_transfer_ext.evals.metric import Values
from hf_transfer_ext.models.heads import head_module
from hf_transfer_ext.models.views import rounded


@contextmanager
def rounded_linears(model: Any, round_weight: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, every linear layer except the head has rounded weights; an adapter is merged first, as usual
    when a model is quantized for inference."""
    head = head_module(model)
    with restored_weights(model), merged_adapter(model):
        with torch.no_grad():
            for name, module in model.named_modules():
                # The adapter's tensors that remain after merging (`lora_A`, ...) are not used in the forward pass.
                if isinstance(module, torch.nn.Linear) and module is not head and ".lora_" not in name:
                    module.weight.copy_(round_weight(module.weight))
        yield


@attack(access="weights", texts=True)
def quantization(subject: Subject, data: AuditData, *, bits: int = 4) -> Values:
    """Round every linear layer except the head to a few bits, which may undo the small changes made by unlearning.

    Symmetric rounding to the nearest level in blocks of 64, in plain torch so that it runs anywhere;
    `bitsandbytes_quantization` has different levels. An adapter is merged first.

    Args:
        bits: Number of bits, from 2 to 8.

    Source: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", 2025,
    https://arxiv.org/abs/2410.16454
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"`bits` must be from 2 to 8, got {bits}.")
    with rounded_linears(subject.model, lambda weight: rounded(weight, bits)):
        return subject.probability(data.forget)
