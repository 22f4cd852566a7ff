"""Where a model keeps its layers, heads and embeddings, by the names of its tensors."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from hf_transfer_ext.adapters.transfer.method import Heads
from hf_transfer_ext.weights.opened import InputModel, Scratch

#: A module or tensor of a numbered layer.
LAYER = re.compile(r"^(?P<before>.*?\.)(?P<layer>\d+)(?P<after>\..+)$")
#: The projections of an attention layer that heads are matched by.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def read_matrix(model: InputModel, name: str) -> Tensor:
    """A whole tensor in float32."""
    tensor = model[name]
    values = torch.empty(tensor.shape)
    tensor.read(0, values.view(-1), Scratch())
    return values


def depth_of(model: InputModel) -> int:
    """Number of layers."""
    layers = {int(match["layer"]) for name in model.tensors if (match := LAYER.match(name))}
    if not layers:
        raise ValueError(f"{str(model.reference)!r} has no numbered layers, so no layers can be matched.")
    return max(layers) + 1


def heads_of(model: InputModel) -> Heads:
    """Number of attention heads, from the config."""
    config = model.text_config
    queries = config.get("num_attention_heads")
    if not queries:
        raise ValueError(f"The config of {str(model.reference)!r} has no `num_attention_heads`.")
    return Heads(queries, config.get("num_key_value_heads") or queries)


def embedding_of(model: InputModel) -> str:
    """Name of the input embeddings."""
    name = next((name for name in model.tensors if name.endswith(_EMBEDDINGS)), None)
    if name is None:
        raise ValueError(f"{str(model.reference)!r} has no input embeddings among its tensors.")
    return name


def attention_of(model: InputModel, layer: int) -> dict[str, Tensor]:
    """The four projections of a layer's attention, by their names; those that it does not have are left out."""
    found = {}
    for name in model.tensors:
        match = LAYER.match(name)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if match and int(match["layer"]) == layer and kind in ATTENTION and name.endswith(".weight"):
            found[kind] = read_matrix(model, name)
    return found


def layer_outputs(model: InputModel) -> list[str]:
    """The layer in each block that writes its result last: the output of the feed-forward part."""
    found: dict[int, str] = {}
    for name in model.tensors:
        match = LAYER.match(name)
        if match and match["after"].endswith((".down_proj.weight", ".fc2.weight", ".dense_4h_to_h.weight")):
            found[int(match["layer"])] = name.removesuffix(".weight")
    if len(found) != depth_of(model):
        raise ValueError(
            f"{str(model.reference)!r}: the feed-forward output of each layer cannot be identified by its name."
        )
    return [found[i] for i in sorted(found)]
