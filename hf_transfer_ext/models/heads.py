"""The output head of a language model, from hidden states to logits, described so that a loss can apply it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: Families that *multiply* by `logits_scaling`; Granite and related models divide.
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax", "hyperclovax_vision_v2")
#: Families that scale the hidden states *before* the head, so nothing remains to be done after it.
_SCALES_BEFORE_THE_HEAD = ("minicpm3",)
#: Config fields that cap the logits: Gemma and most others, xLSTM, RecurrentGemma.
_SOFTCAP_FIELDS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
#: Config fields that multiply the projection: Cohere, MuseGlimmer, FalconH1.
_SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass(frozen=True)
class LogitFinish:
    """What a model applies to the output of its head: `softcap * tanh(scale * projected / softcap)`.

    Args:
        scale: Multiplies the projection (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: Largest absolute value of the logits (Gemma's `final_logit_softcapping`), or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, projected: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Scale and cap projected logits that already include the bias."""
        if self.scale != 1.0:
            projected = projected * self.scale
        if self.softcap is not None:
            projected = torch.tanh(projected / self.softcap) * self.softcap
        return projected


@dataclass
class LMHead:
    """A plain linear head: `finish(hidden @ weight.T + bias)`.

    Args:
        weight: `(vocab, hidden)`.
        bias: `(vocab,)` or None.
        finish: Scale and soft cap of the logits.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    finish: LogitFinish = LogitFinish()

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Logits in the dtype of the head, as the model itself computes them."""
        return self.finish(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def detach(self) -> LMHead:
        return LMHead(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.finish)

    def clone(self) -> LMHead:
        return LMHead(self.weight.clone(), None if self.bias is None else self.bias.clone(), self.finish)


def logit_finish(model: Any) -> LogitFinish:
    """Scaling and capping of the logits according to the model's config; none for most models."""
    config = causal_lm_of(model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = next((cap for field in _SOFTCAP_FIELDS if (cap := getattr(text, field, None)) is not None), None)
    for field in _SCALE_FIELDS:
        if getattr(text, field, None) is not None:
            return LogitFinish(float(getattr(text, field)), softcap)
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None or text.model_type in _SCALES_BEFORE_THE_HEAD:
        return LogitFinish(1.0, softcap)
    return LogitFinish(scaling if text.model_type in _MULTIPLIES_BY_LOGITS_SCALING else 1.0 / scaling, softcap)


def causal_lm_of(model: Any) -> Any:
    """The causal language model inside wrappers (DDP, FSDP, compiled, PEFT)."""
    while True:
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif hasattr(model, "module") and isinstance(model.module, nn.Module):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def head_module(model: nn.Module) -> Any:
    """The module that projects to the vocabulary. Raises `ValueError` if the model has none."""
    causal = causal_lm_of(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{type(causal).__name__} has no output embeddings: a causal language model is needed.")
    return head


def head_rows(model: nn.Module) -> int:
    """Number of vocabulary entries in a model's head, also if ZeRO-3 has replaced the weight by an empty one."""
    weight = head_module(model).weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def vocabulary_size(model: Any) -> int:
    """Number of vocabulary entries according to the config."""
    return causal_lm_of(model).config.get_text_config().vocab_size


def is_plain_head(head: nn.Module) -> bool:
    """True for a linear layer without adapter or quantization, which is fully described by its weight and bias."""
    return type(head) is nn.Linear and head.weight.is_floating_point()


def head_of(model: nn.Module) -> LMHead:
    """Describe a model's plain linear head. Its parameters are shared with the model, not copied.

    Raises:
        ValueError: The head has an adapter, is quantized, or is not a linear layer.
    """
    head = head_module(model)
    if not is_plain_head(head):
        raise ValueError(
            f"A plain linear head is needed, got {type(head).__name__}. Exclude the head from the adapter's target "
            "modules and from quantization."
        )
    return LMHead(head.weight, head.bias, logit_finish(model))


#: Heads whose forward is currently replaced -> their previous forward.
_OWN_FORWARD: dict[int, Callable[[Tensor], Tensor]] = {}


@contextmanager
def head_replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, `head(hidden)` calls `forward(hidden)`; all wrappers and hooks around it stay in place.

    A loss computed there has access to the full weights of the head, even if FSDP, ZeRO-3 or the offloading hooks of
    accelerate gather them on the device only for this call. `own_forward(head)` still computes the original output.
    """
    # accelerate stores its hook in the instance's `forward`, which moves inputs and weights to the device, calls
    # `_old_forward`, and moves them back: replacing `_old_forward` keeps all of that.
    place = "_old_forward" if hasattr(head, "_hf_hook") and "_old_forward" in vars(head) else "forward"
    stood_there = vars(head).get(place)
    _OWN_FORWARD[id(head)] = getattr(head, place)
    setattr(head, place, forward)
    try:
        yield
    finally:
        del _OWN_FORWARD[id(head)]
        if stood_there is None:
            delattr(head, place)  # the forward of the class applies again
        else:
            setattr(head, place, stood_there)


def own_forward(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The original forward of the head, including adapters, also while `head_replaced` replaces it."""
    return _OWN_FORWARD.get(id(head), head)


def run_to_head(model: nn.Module, read: Callable[[Tensor], Tensor | None], **inputs: Any) -> Any:
    """Run the whole model once with `read(hidden)` in place of the output head, so that no logits are computed.

    Args:
        read: Called with the head's input, `(batch, length, hidden)`, while the full weights of the head are on the
            device. May return a tensor that replaces the logits, for wrappers that trace the output back to the
            parameters; if it returns None, the first hidden unit replaces them.
        inputs: The model's inputs.

    A model under `torch.compile` is one graph up to its head, and `read` is called after that graph.

    Returns:
        The model's output; its `logits` are meaningless.
    """

    def instead(hidden: Tensor) -> Tensor:
        stand_in = read(hidden)
        return hidden[..., :1] if stand_in is None else stand_in

    if not is_compiled(model):
        with head_replaced(head_module(model), instead):
            return model(**inputs)
    _NOTED.clear()
    try:
        with head_replaced(head_module(model), _note_hidden):
            outputs = model(**inputs)
        ((hidden, autocast, dtype),) = _NOTED
        with torch.autocast(hidden.device.type, dtype=dtype, enabled=autocast):  # as it is inside the head
            outputs.logits = instead(hidden)
    finally:
        _NOTED.clear()
    return outputs


#: What the head of a compiled model is given, from `_note_hidden` to the end of `run_to_head`.
_NOTED: list[tuple[Tensor, bool, torch.dtype]] = []


def _note_hidden(hidden: Tensor) -> Tensor:
    """Stands for the head in a compiled graph: one function for all steps, so that the graph is traced once.

    `read`, a new function in each step, is called after the graph, on what is noted here.
    """
    kind = hidden.device.type
    _NOTED.append((hidden, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))
    return hidden[..., :1]


def is_compiled(model: Any) -> bool:
    """Whether `torch.compile` wraps this model."""
    return isinstance(model, torch._dynamo.OptimizedModule)


def uncompiled(model: Any) -> Any:
    """The model that `torch.compile` wraps, for single passes that are not worth a graph; others as they are."""
    return model._orig_mod if is_compiled(model) else model
