"""Views of a model: within a block its weights act rounded, or its hidden states shifted. No weight is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_transfer_ext.models.heads import causal_lm_of, head_module


def rounded(weight: Float[Tensor, "rows columns"], bits: int, block: int = 64) -> Float[Tensor, "rows columns"]:
    """Weights rounded to `2**bits - 1` even levels between -max and max of each run of `block` weights in a row."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block)).reshape(rows, -1, block)
    scale = padded.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return ((padded / scale).round() * scale).reshape(rows, -1)[:, :columns].to(weight.dtype)


@contextmanager
def rounded_weights(
    model: nn.Module, bits: int, block: int = 64, *, active: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Within the block every linear layer but the head computes with its rounded weight; gradients pass straight
    through the rounding.

    A LoRA counts as merged before the rounding, as it is where a model is quantized for use. The block has to hold the
    backward pass too: gradient checkpointing computes the forward pass once more.

    Args:
        bits: As in `rounded`.
        active: Asked at each forward pass; False computes with the weights as they are.

    Raises:
        ValueError: The model is quantized already, or an adapter's change is not a sum (only LoRA-like ones are).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = head_module(model)
    adapted = {id(m.get_base_layer()): m for m in model.modules() if isinstance(m, BaseTunerLayer)}
    own_parts = {id(part) for layer in adapted.values() for part in _parts_of_adapter(layer)}
    handles = []
    try:
        for name, module in model.named_modules():
            is_head = module is head or adapted.get(id(module)) is head
            if not isinstance(module, nn.Linear) or is_head or id(module) in own_parts:
                continue
            if not module.weight.is_floating_point():
                raise ValueError(
                    f"The weight of {name!r} is {module.weight.dtype}: it is quantized already, so there is nothing "
                    "left to round. Train on the model in float32 or bfloat16."
                )
            change = _change_by_adapter(name, adapted.get(id(module)))
            handles.append(module.register_forward_hook(_adds_rounding(change, bits, block, active)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts_of_adapter(layer: Any) -> Iterator[nn.Module]:
    base = layer.get_base_layer()
    inside = {id(module) for module in base.modules()}
    return (module for module in layer.modules() if module is not layer and id(module) not in inside)


def _change_by_adapter(name: str, layer: Any) -> Callable[[], Tensor | None]:
    if layer is None:
        return lambda: None
    if not hasattr(layer, "get_delta_weight") or not hasattr(layer, "lora_A"):
        raise ValueError(
            f"{type(layer).__name__} at {name!r} is not a LoRA, so its weight cannot be rounded as if it were merged. "
            "Use a LoRA or full fine-tuning."
        )

    def change() -> Tensor | None:
        if layer.disable_adapters or layer.merged:
            return None
        found = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_A]
        return torch.stack(found).sum(0) if found else None

    return change


def _adds_rounding(
    change: Callable[[], Tensor | None], bits: int, block: int, active: Callable[[], bool]
) -> Callable[[Any, Any, Tensor], Tensor | None]:
    """A hook that adds what rounding does to a linear layer's output: `(Q(W) - W) x`, with a constant factor."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        if not active():
            return None
        with torch.no_grad():
            by_adapter = change()
            weight = module.weight if by_adapter is None else module.weight + by_adapter.to(module.weight.dtype)
            error = rounded(weight, bits, block) - weight
        return output + nn.functional.linear(inputs[0].to(error.dtype), error)

    return hook


@contextmanager
def hidden_states_changed(model: nn.Module, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block the output of one decoder layer goes on as `change(hidden)`, `(batch, length, hidden)`.

    Args:
        layer: From 1 to the number of layers, as in `output_hidden_states`.
    """

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = decoder_layers(model)[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the only list of as many modules as the config has layers.

    Raises:
        ValueError: There is no such list, or more than one.
    """
    causal = causal_lm_of(model)
    count = causal.config.get_text_config().num_hidden_layers
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else causal
    found = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ValueError(
            f"{type(causal).__name__} has {len(found)} lists of {count} modules in its decoder, so its layers cannot "
            "be told. A decoder with one list of layers is needed."
        )
    return found[0]
