from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.evals.audit.subject import AuditData, Subject, restored_weights
from hf_transfer_ext.evals.metric import Values


def rounded(weight: Float[Tensor, "rows columns"], bits: int, block: int = 64) -> Float[Tensor, "rows columns"]:
    """Weights rounded to `2**bits - 1` even levels between -max and max of each run of `block` weights in a row."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block)).reshape(rows, -1, block)
    scale = padded.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return ((padded / scale).round() * scale).reshape(rows, -1)[:, :columns].to(weight.dtype)


def quantization(subject: Subject, data: AuditData, *, bits: int = 4) -> Values:
    """Round every linear layer but the head to few bits: small changes that unlearning made may round away.

    Symmetric rounding to the nearest level in blocks of 64, in plain torch so that it runs anywhere; nf4 and int8 of
    bitsandbytes place their levels otherwise. Quantised models of users come with such rounding.

    Args:
        bits: From 2 to 8.

    Source: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", 2025,
    https://arxiv.org/abs/2410.16454
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"`bits` has to be from 2 to 8, got {bits}.")
    head = subject.model.get_output_embeddings()
    with restored_weights(subject.model):
        for module in subject.model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                module.weight.data = rounded(module.weight.data, bits)
        return subject.probability(data.forget)
