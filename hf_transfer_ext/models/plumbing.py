"""Helpers for loaded models: hidden states and logits, evaluation mode, sharding, adapters, the padding token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_transfer_ext.models.heads import (
    causal_lm_of,
    head_module,
    head_of,
    head_replaced,
    is_plain_head,
    logit_finish,
    own_forward,
    run_to_head,
    uncompiled,
    vocabulary_size,
)
from hf_transfer_ext.registry import unknown_name

Rows = Float[Tensor, "rows hidden"]
RowLogits = Float[Tensor, "rows vocab"]

#: Adapter name that selects the base model, with all adapters disabled.
BASE = "base"


def output_head(model: Any) -> Callable[[Rows], RowLogits]:
    """Hidden rows -> float32 logits, as the model's forward computes them: head, adapters, scale, soft cap."""
    head, finish = head_module(model), logit_finish(model)
    return lambda rows: finish(own_forward(head)(rows).float())


def hidden_states(model: Any, **inputs: Any) -> tuple[Any, Any]:
    """(input of the output head, output of the model): one forward pass of the whole model, without the logits."""
    found: list[Tensor] = []
    output = run_to_head(model, found.append, **inputs)
    return found[-1], output


def is_sharded(model: Any = None, accelerator: Accelerator | None = None) -> bool:
    """Whether the full weights exist only during the forward of their module, as under FSDP and ZeRO-3.

    Args:
        model: A model that may already be sharded.
        accelerator: An accelerator that shards the models it prepares, now or later.
    """
    if accelerator is not None:
        if accelerator.distributed_type == DistributedType.FSDP:
            return True
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return accelerator.state.deepspeed_plugin.zero_stage == 3
    if model is None:
        return False
    # Of all parameters: FSDP2 leaves those of its root whole after a forward pass that no backward pass follows.
    return "FullySharded" in type(model).__name__ or any(
        hasattr(parameter, "placements") or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


@contextmanager
def gathered_weights(*models: Any, accelerator: Accelerator) -> Iterator[None]:
    """Within the block, weights that FSDP2 shards are whole on each process, and no forward pass waits for another.

    Every process enters and leaves it. Whatever is not sharded by FSDP2, or not a model, is left as it is.
    """
    networks = [model for model in models if isinstance(model, nn.Module)]
    parts = [part for network in networks for part in network.modules() if isinstance(part, FSDPModule)]
    if not parts:
        yield
        return
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        afterward = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(afterward, recurse=False)


@contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Turn off dropout within the block; the training flag of every module is restored afterward."""
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for model in models:
        if model is not None:
            model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def probing(model: Any) -> Iterator[None]:
    """For test runs without side effects: evaluation mode, no gradients, and the random state restored afterward."""
    devices = [parameter.device for parameter in islice(model.parameters(), 1) if parameter.is_cuda]
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluation_mode(model):
        yield


def head_is_understood(model: Any, *, plain: bool = True) -> bool:
    """Whether hidden states, head and `logit_finish` reproduce the model's logits, tested on a few tokens.

    transformers implements the steps after the head in each model's forward. If these steps are unknown, losses and
    scores must use the logits that the model returns.

    Args:
        plain: Also require a plain linear head, whose weight a loss can apply directly.
    """
    model = uncompiled(model)
    head = head_module(model)
    if plain and not is_plain_head(head):
        return False
    finish = logit_finish(model)
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device="cpu" if device.type == "meta" else device)[None] % vocabulary_size(model)
    decodes = getattr(causal_lm_of(model).config, "is_encoder_decoder", False)
    more = no_cache(model) | ({"decoder_input_ids": ids} if decodes else {})
    found: list[tuple[Tensor, torch.dtype]] = []

    def compare(hidden: Tensor) -> Tensor:
        projected = own_forward(head)(hidden)
        described = head_of(model).logits(hidden) if plain else finish(projected.float())
        found.append((described.float(), projected.dtype))
        return projected

    try:
        with probing(model), head_replaced(head, compare):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits.float()
    except (AttributeError, TypeError, NotImplementedError, IndexError):
        return False  # the model has another signature or returns its logits in another way
    if not found or found[-1][0].shape != logits.shape:
        return False
    described, dtype = found[-1]
    error = (logits - described.to(logits.device)).abs().max() / logits.abs().max().clamp(min=1e-3)
    return bool(error < (1e-3 if dtype == torch.float32 else 1e-2))


def accepts(model: Any, name: str) -> bool:
    """Whether the forward of a model, inside its wrappers, takes an argument of this name."""
    taken = inspect.signature(type(causal_lm_of(model)).forward).parameters
    return name in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())


def no_cache(model: Any) -> dict[str, Any]:
    """The argument that lets a model read a text once, without storing keys and values; {} where it takes none."""
    return {"use_cache": False} if accepts(model, "use_cache") else {}


def attention_span(model: Any) -> float:
    """The number of past tokens that every layer of the model attends to."""
    config: Any = causal_lm_of(model).config.get_text_config()
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((span for span in spans if span), default=math.inf)


def pad_token_id(tokenizer: Any) -> int:
    """The id that batches are padded with: the padding token, else end of sequence, else 0. It is always masked."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


@contextmanager
def active_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Within the block, `model` uses `adapter`: a name, "base" for no adapter, None for the currently active one.

    Nothing is loaded or copied. The active adapters and `requires_grad` of the weights are restored afterward, also
    when the block raises.

    Raises:
        ValueError: The model has no such adapter.
    """
    if adapter is None:
        yield
        return
    check_adapter(model, adapter)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before, named = list(model.active_adapters), model.active_adapter
    try:
        if adapter == BASE:
            with model.disable_adapter():
                yield
        else:
            _switch(model, [adapter])
            yield
    finally:
        if adapter != BASE:
            _switch(model, before)
            model.active_adapter = named
        for parameter, required in trainable:
            parameter.requires_grad_(required)


def check_adapter(model: Any, adapter: str) -> None:
    """Raise `ValueError` if the model does not have this adapter; "base" (no adapter) is always valid."""
    if not hasattr(model, "peft_config"):
        raise ValueError(
            f"Adapter {adapter!r} was requested, but {type(model).__name__} is not a PeftModel. Load the adapter onto "
            "it with `PeftModel.from_pretrained(model, path)` or `model.load_adapter(path, adapter_name=...)`."
        )
    if adapter != BASE and adapter not in model.peft_config:
        raise ValueError(unknown_name("adapter", adapter, [*model.peft_config, BASE]))


def _switch(model: Any, adapters: list[str]) -> None:
    """Activate these adapters; several at once where the PEFT method allows it."""
    if len(adapters) == 1:
        model.set_adapter(adapters[0])
    else:
        model.base_model.set_adapter(adapters)
