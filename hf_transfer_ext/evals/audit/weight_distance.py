"""The distance of an unlearned model's weights from the original's, and how much of it rounding would undo."""

from __future__ import annotations

import math
from typing import Any

import torch

from hf_transfer_ext.evals.audit.subject import merged_adapter, restored_weights
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.heads import causal_lm_of, head_module


def weight_distance(unlearned: Any, original: Any, *, bits: tuple[int, ...] = (4, 8)) -> list[Measurement]:
    r"""Distances over all weights that both models share; an adapter is merged into its base first.

    `weight_distance` is :math:`\lVert W_u - W_o \rVert / \lVert W_o \rVert` over the tensors that differ (the others,
    mostly embeddings and norms, would hide the difference); `changed_weights` is the share of weights that differ;
    `lost_by_rounding(bits)` is the share of those, in linear layers, that round to the same level of the original's
    blocks: the part that quantization undoes.

    Returns:
        The measurements; empty if the models do not share any weight with the same name and shape.

    Source: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", 2025 (section 4, why small changes
    are rounded away), https://arxiv.org/abs/2410.16454
    """
    apart = length = changed = count = 0.0
    linear = 0.0
    lost = dict.fromkeys(bits, 0.0)
    with restored_weights(unlearned), merged_adapter(unlearned), restored_weights(original), merged_adapter(original):
        theirs = _weights(original)
        tied = _head_weight(original)
        for name, ours in _weights(unlearned).items():
            other = theirs.get(name)
            if other is None or other.shape != ours.shape or not ours.is_floating_point():
                continue
            ours, other = ours.float(), other.to(ours.device).float()
            moved = ours != other
            if bool(moved.any()):
                apart += float((ours - other).double().square().sum())
                length += float(other.double().square().sum())
            changed += float(moved.sum())
            count += ours.numel()
            if ours.ndim != 2 or not bool(moved.any()) or theirs[name].data_ptr() == tied:
                continue
            linear += float(moved.sum())
            for width in bits:
                lost[width] += float((moved & (_levels(ours, other, width))).sum())
    if not count:
        return []
    size = int(count)
    found = [
        Measurement(
            "weight_distance",
            math.sqrt(apart / length) if length else 0.0,
            "share of the original's norm",
            False,
            size,
        ),
        Measurement("changed_weights", changed / count, "share of weights", False, size),
    ]
    found += [
        Measurement(f"lost_by_rounding(bits={width})", lost[width] / linear, "share of changed weights", False, size)
        for width in bits
        if linear
    ]
    return found


def _levels(ours: torch.Tensor, theirs: torch.Tensor, bits: int, block: int = 64) -> torch.Tensor:
    """True where both are rounded to the same level of the original's blocks."""
    rows, columns = theirs.shape
    pad = (0, -columns % block)
    scale = torch.nn.functional.pad(theirs, pad).reshape(rows, -1, block).abs().amax(-1, keepdim=True).clamp(min=1e-12)
    scale = scale / (2 ** (bits - 1) - 1)
    step = [(torch.nn.functional.pad(w, pad).reshape(rows, -1, block) / scale).round() for w in (ours, theirs)]
    return (step[0] == step[1]).reshape(rows, -1)[:, :columns]


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of the causal model, by their names in a model without adapters."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in causal_lm_of(model).state_dict().items()
        if ".lora_" not in name
    }


def _head_weight(model: Any) -> int:
    return head_module(model).weight.data_ptr()
