"""The last layer of a language model, from hidden states to logits, described so that a loss can apply it itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

#: Families that *multiply* by `logits_scaling`; Granite and its kin divide.
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


@dataclass
class LMHead:
    """What turns hidden states into logits: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Args:
        weight: `(vocab, hidden)`.
        bias: `(vocab,)` or None.
        scale: Multiplies the projection (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: Bound of the logits (Gemma's `final_logit_softcapping`), or None.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def finish(self, projected: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Scale and cap a projection that has its bias already. May overwrite `projected`."""
        if self.scale != 1.0:
            projected = projected * self.scale
        if self.softcap is not None:
            projected = torch.tanh(projected / self.softcap) * self.softcap
        return projected

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Logits in the dtype of the head, as the model itself gives them."""
        return self.finish(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def detach(self) -> LMHead:
        return LMHead(
            self.weight.detach(), None if self.bias is None else self.bias.detach(), self.scale, self.softcap
        )


def logit_scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """How a model's config says that projected logits are scaled and capped; `(1.0, None)` for most models."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(text, "final_logit_softcapping", None)
    for field in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, field, None) is not None:
            return float(getattr(text, field)), softcap
    scaling = getattr(text, "logits_scaling", None)
    if scaling is not None:
        return (scaling if text.model_type in _MULTIPLIES_BY_LOGITS_SCALING else 1.0 / scaling), softcap
    return 1.0, softcap


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
    """The module that projects to the vocabulary, or a `ValueError` where the model has none."""
    causal = causal_lm_of(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{type(causal).__name__} has no output embeddings: a causal language model is needed.")
    return head


def head_rows(model: nn.Module) -> int:
    """Vocabulary entries of a model's head, also where ZeRO-3 left an empty weight in place of the whole one."""
    weight = head_module(model).weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def is_plain_head(head: nn.Module) -> bool:
    """True for an unadapted, unquantised linear layer, whose weight alone tells what it computes."""
    return type(head) is nn.Linear and head.weight.is_floating_point()


def head_of(model: nn.Module) -> LMHead:
    """Describe a model's plain linear head. Its parameters are the model's own, not copies.

    Raises:
        ValueError: the head is adapted, quantised or no linear layer.
    """
    head = head_module(model)
    if not is_plain_head(head):
        raise ValueError(
            f"A plain linear head is needed, got {type(head).__name__}. Leave the head out of the adapter's target "
            "modules and of quantisation."
        )
    return LMHead(head.weight, head.bias, *logit_scale_and_softcap(causal_lm_of(model).config))


@contextmanager
def head_replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, `head(hidden)` calls `forward(hidden)`; all wrappers and hooks around it stay in place.

    A loss computed there sees the head's weights whole, also where FSDP or ZeRO-3 gathers them only for this moment.
    """
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward  # the class's own forward shows again


@torch.no_grad()
def head_is_understood(model: nn.Module, input_ids: Int[Tensor, "batch length"]) -> bool:
    """Whether a model's plain head, as described here, gives the model's own logits on the first tokens of a batch.

    Where it does not (a family that treats its logits in a way of its own), losses have to take the model's logits.
    """
    head = head_module(model)
    if not is_plain_head(head):
        return False
    scale, softcap = logit_scale_and_softcap(causal_lm_of(model).config)
    described: list[Tensor] = []

    def compare(hidden: Tensor) -> Tensor:
        described.append(LMHead(head.weight, head.bias, scale, softcap).logits(hidden))
        return type(head).forward(head, hidden)

    with head_replaced(head, compare):
        logits = model(input_ids=input_ids[:1, :8], use_cache=False).logits
    size = logits.float().abs().max().clamp(min=1e-3)
    return bool(((logits.float() - described[-1].float()).abs().max() / size) < 1e-2)
