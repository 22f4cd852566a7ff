from __future__ import annotations

import torch
from torch import Tensor

from hf_transfer_ext.evals.audit.attack import attack
from hf_transfer_ext.evals.audit.attacks.quantization import rounded_linears
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric import Values

KINDS = ("nf4", "fp4", "int8")


def bitsandbytes_rounded(weight: Tensor, kind: str) -> Tensor:
    """Quantize a weight with bitsandbytes and dequantize it: the values that its layers compute with.

    nf4 and fp4 use blocks of 64 weights; int8 has one scale per row.

    Raises:
        ValueError: `kind` is unknown, or bitsandbytes is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(f"{kind} needs bitsandbytes, which is not installed: pip install bitsandbytes") from error
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.detach().to(torch.float16))
        return functional.int8_vectorwise_dequant(codes, scales).to(weight.dtype)
    codes, state = functional.quantize_4bit(weight.detach().contiguous(), blocksize=64, quant_type=kind)
    return functional.dequantize_4bit(codes, state).to(weight.dtype)


@attack(access="weights", texts=True)
def bitsandbytes_quantization(subject: Subject, data: AuditData, *, kind: str = "nf4") -> Values:
    """Quantize the model with bitsandbytes (nf4, fp4 or int8), as most users with little memory do.

    Weights only: the 8-bit activations of the int8 layers are not simulated. An adapter is merged first.

    Args:
        kind: "nf4", "fp4" or "int8".

    Raises:
        ValueError: bitsandbytes is not installed.

    Source: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", 2025,
    https://arxiv.org/abs/2410.16454; formats of Dettmers et al., "QLoRA", 2023, https://arxiv.org/abs/2305.14314
    """
    bitsandbytes_rounded(torch.zeros(64, 64), kind)  # fails before any weight is changed
    with rounded_linears(subject.model, lambda weight: bitsandbytes_rounded(weight, kind)):
        return subject.probability(data.forget)
