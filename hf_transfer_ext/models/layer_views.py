"""What some layers of a decoder or an encoder compute in a forward pass: hidden states, queries, keys and values.

Nothing is changed. Only the layers that are asked for are kept in memory, whatever wraps the model (DDP, FSDP, PEFT),
and with gradient checkpointing. Attention is read where transformers calls it, after rotary embeddings, for every
model that goes through its attention interface.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_transfer_ext.models.heads import causal_lm_of, head_module

#: The number of the embeddings, what the first layer reads, among layers that count from 0.
EMBEDDINGS = -1
#: The number of the features, what the head reads.
FEATURES = -2
#: Families whose states are `(length, batch, width)` inside the network.
_LENGTH_FIRST = ("xlnet",)


@dataclass
class LayerView:
    """What a layer computed in the last forward pass.

    Args:
        states: `(batch, length, width)`, its output.
        query, key, value: `(batch, heads, length, head width)`, as attention reads them; None where not asked for.
        scaling: Factor of the product of queries and keys.
        softcap: Largest absolute value of attention scores, or None.
        bias: What is added to attention scores for the distance of two tokens (T5), or None.
        causal: Whether a token looks only at itself and those before it, as the attention says of itself.
    """

    states: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None
    causal: bool | None = None

    def attended_values(self) -> Tensor:
        """The values that each attention head reads, `(batch, heads, length, head width)`."""
        query, value = self.query, self.value
        assert query is not None and value is not None
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    def scores(self) -> Tensor:
        """Attention scores before their softmax, `(batch, heads, length, length)`, without any mask."""
        query, key = self.query, self.key
        assert query is not None and key is not None
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(2, 3) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores if self.bias is None else scores + self.bias


#: The two stacks of layers of an encoder-decoder. A model with one stack has it as its "decoder".
Side = Literal["decoder", "encoder"]
SIDES: tuple[Side, ...] = get_args(Side)


def layers_of(model: nn.Module, side: Side = "decoder") -> nn.ModuleList:
    """The layers of a decoder or an encoder; of a vision-language model, those of its language model.

    Args:
        side: Whose layers of an encoder-decoder.

    Raises:
        ValueError: They cannot be told from other parts, their states are not those of the tokens, or there is no
            encoder beside a decoder.
    """
    causal = causal_lm_of(model)
    config, name = causal.config, type(causal).__name__
    if config.model_type in _LENGTH_FIRST:
        raise ValueError(f"The layers of {name} cannot be compared: their states are not ordered by text and token.")
    part = _part_of(model, side)
    if getattr(config, "is_encoder_decoder", False):
        found = [m for m in part.children() if isinstance(m, nn.ModuleList)]
        name, wanted = f"The {side} of {name}", "one list of modules"
    else:
        count = config.get_text_config().num_hidden_layers
        wanted = f"one list of {count} modules"
        for within in (part, causal.base_model):
            found = _outermost_lists(within, count)
            if found:
                break
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(found)} lists of modules that could be its layers, needed is {wanted}. Models whose "
            "layers share their weights (ALBERT), or are of several kinds, cannot be compared layer by layer."
        )
    return found[0]


def width_of(model: nn.Module, side: Side = "decoder") -> int:
    """The width of the hidden states between the layers of `layers_of`."""
    causal = causal_lm_of(model)
    is_one = not getattr(causal.config, "is_encoder_decoder", False)
    config = causal.config if is_one else getattr(_part_of(model, side), "config", causal.config)
    return int(config.get_text_config().hidden_size)


def _part_of(model: nn.Module, side: Side) -> Any:
    """The module of a model that holds the layers of a side; the model itself, where it does not tell."""
    causal = causal_lm_of(model)
    if side == "encoder":
        if not getattr(causal.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(causal).__name__} has no encoder beside a decoder. Leave `side` out: it has one stack of "
                "layers."
            )
        return causal.get_encoder()
    return causal.get_decoder() if hasattr(causal, "get_decoder") else causal


def _outermost_lists(part: nn.Module, count: int) -> list[nn.ModuleList]:
    """The lists of `count` modules in a part of a model, without those inside another one."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in part.named_modules():  # outer modules come before those in them
        if isinstance(module, nn.ModuleList) and len(module) == count:
            if not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
    return list(found.values())


@contextmanager
def layers_viewed(
    model: nn.Module, layers: Iterable[int], *, attention: Collection[int] = (), side: Side = "decoder"
) -> Iterator[dict[int, LayerView]]:
    """Within the block, every forward pass of the model leaves the views of some of its layers in the dictionary.

    Args:
        layers: Counted from 0; `EMBEDDINGS` for what the first one reads, `FEATURES` for what the head reads.
        attention: Those of them whose queries, keys and values are read, too.
        side: Whose layers of an encoder-decoder.
    """
    found: dict[int, LayerView] = {layer: LayerView() for layer in layers}
    modules = layers_of(model, side)
    with ExitStack() as stack:
        for layer, view in found.items():
            if layer in (EMBEDDINGS, FEATURES):
                reader = modules[0] if layer == EMBEDDINGS else head_module(model)
                handle = reader.register_forward_pre_hook(_keeps_input(view), with_kwargs=True)
            else:
                handle = modules[layer].register_forward_hook(_keeps_output(view))
            stack.callback(handle.remove)
        if attention:
            owners = {id(part): found[layer] for layer in attention for part in modules[layer].modules()}
            stack.enter_context(_attention_viewed(model, owners))
        yield found


def _keeps_output(view: LayerView) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        view.states = output[0] if isinstance(output, tuple) else output

    return hook


def _keeps_input(view: LayerView) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, named: Any) -> None:
        view.states = inputs[0] if inputs else named["hidden_states"]

    return hook


@contextmanager
def _attention_viewed(model: nn.Module, owners: dict[int, LayerView]) -> Iterator[None]:
    """Keep what attention is called with, for the modules in `owners`, whichever implementation the model uses."""
    causal = causal_lm_of(model)
    named = (
        getattr(causal.config.get_text_config(), "_attn_implementation", None) or causal.config._attn_implementation
    )
    own = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = own.get(named)
    given = ALL_ATTENTION_FUNCTIONS.get(named)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        view = owners.get(id(module))
        if view is not None:
            view.query, view.key, view.value = query, key, value
            scaling = kwargs.get("scaling", args[1] if len(args) > 1 else None)
            view.scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            view.softcap, view.bias = kwargs.get("softcap"), kwargs.get("position_bias")
            view.causal = getattr(module, "is_causal", None)
        function: Any = given or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[named] = attend
    try:
        yield
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS[named]
        else:
            ALL_ATTENTION_FUNCTIONS[named] = before
    for view in owners.values():
        if view.states is not None and view.query is None:
            raise ValueError(
                f"{type(causal).__name__} does not call attention through the interface of transformers, so its "
                "queries, keys and values cannot be read. Choose a `hidden_loss` on hidden states."
            )
