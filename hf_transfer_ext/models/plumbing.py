"""Hidden states and logits of a loaded model, whether its weights are sharded, and its adapters switched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.models.heads import causal_lm_of, head_module, head_replaced, logit_scale_and_softcap

Rows = Float[Tensor, "rows hidden"]


RowLogits = Float[Tensor, "rows vocab"]


def output_head(model: Any) -> Callable[[Rows], RowLogits]:
    """Hidden rows -> logits, as the model's own forward does: head (adapted or not), bias, logit scale, soft cap."""
    head = head_module(model)
    scale, softcap = logit_scale_and_softcap(causal_lm_of(model).config)

    def project(rows: Rows) -> RowLogits:
        # The class's own forward: the instance's may stand replaced at this moment.
        logits = type(head).forward(head, rows).float() * scale
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    return project


def vocabulary_size(model: Any) -> int:
    config: Any = causal_lm_of(model).config
    return config.get_text_config().vocab_size


def hidden_states(model: Any, **inputs: Any) -> tuple[Any, Any]:
    """(input of the output head, the model's output): one whole forward of the model, without its logits."""
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden[..., :1]  # stands where the logits would; nobody reads it

    with head_replaced(head_module(model), keep):
        output = model(**inputs)
    return kept[-1], output


def is_sharded(model: Any) -> bool:
    """Whether weights are whole only within the forward of the model, as under FSDP and ZeRO-3."""
    parameter = next(iter(model.parameters()))
    return hasattr(parameter, "placements") or hasattr(parameter, "ds_id") or "FullySharded" in type(model).__name__


def attention_span(model: Any) -> float:
    """The number of tokens that every layer of the model looks back on."""
    config: Any = causal_lm_of(model).config.get_text_config()
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((span for span in spans if span), default=math.inf)


@torch.no_grad()
def head_is_faithful(model: Any) -> bool:
    """Whether hidden states + `output_head` give the model's own logits, tried on three tokens.

    Transformers writes what follows the head into each model's forward; a model whose steps are not known, or whose
    weights are whole only within its own forward (FSDP, ZeRO-3), is scored from its own logits.
    """
    if is_sharded(model):
        return False
    ids = torch.arange(1, 4, device=next(model.parameters()).device)[None] % vocabulary_size(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        own = model(**inputs).logits.float()
        hidden, _ = hidden_states(model, **inputs)
        mine = output_head(model)(hidden[0])
    except (AttributeError, TypeError, NotImplementedError, IndexError):
        return False
    return torch.allclose(mine, own[0], rtol=1e-3, atol=1e-3)


@contextmanager
def active_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Within the block `model` works with `adapter`: a name, "base" for none at all, None for what is active.

    Nothing is loaded or copied; afterwards the adapter, and which weights are trainable, is as before.

    Raises:
        ValueError: The model has no such adapter.
    """
    if adapter is None:
        yield
        return
    if not hasattr(model, "peft_config"):
        raise ValueError(f"Adapter {adapter!r} was asked for, but {type(model).__name__} is not a PeftModel.")
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    if adapter == "base":
        with model.disable_adapter():
            yield
    else:
        if adapter not in model.peft_config:
            raise ValueError(f"There is no adapter {adapter!r}. Loaded: {', '.join(model.peft_config)}, base.")
        before = model.active_adapter
        model.set_adapter(adapter)
        try:
            yield
        finally:
            model.set_adapter(before)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
