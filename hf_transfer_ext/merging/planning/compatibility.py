"""Whether models compute the same with the same weights, which equal names and shapes do not guarantee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_transfer_ext.merging.planning.config import Source
from hf_transfer_ext.merging.planning.names import layer_config, layer_count, layer_keys, split_layer
from hf_transfer_ext.weights.opened import InputModel

#: Config keys that change what a weight means, though not its shape: 16 heads of 64 are stored as 8 heads of 128 are.
MEANING_KEYS = (
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "head_dim",
    "num_experts_per_tok",
    "hidden_act",
    "hidden_activation",
    "activation_function",
)

#: Model types with the same architecture; all others only merge with models of their own type.
ALIKE_TYPES = ({"llama", "mistral"}, {"gemma3", "gemma3_text"})

#: Other names of the same function.
_SAME_ACTIVATION = {"silu": "swish", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def check_same_kind(sources: Sequence[Source], models: Mapping[Any, InputModel]) -> None:
    """Refuse sources of one slice that are built differently.

    Args:
        sources: With their layers; a base model that takes part is one of them.

    Raises:
        ValueError: Their types, heads, activations, or the kinds of their layers differ.
    """
    first = sources[0]
    one = models[first.model]
    for source in sources[1:]:
        other = models[source.model]
        names = f"{str(first.model)!r} and {str(source.model)!r}"
        types = {str(model.text_config.get("model_type", model.config.get("model_type"))) for model in (one, other)}
        if len(types) > 1 and not any(types <= alike for alike in ALIKE_TYPES):
            raise ValueError(
                f"{names} are of different types ({', '.join(sorted(types))}), which calculate different things with "
                "the same weights. Only models of one architecture can be merged."
            )
        for key in MEANING_KEYS:
            values = [_meaning(key, model.text_config.get(key)) for model in (one, other)]
            if None not in values and values[0] != values[1]:
                raise ValueError(
                    f"{names} differ in `{key}` of their config.json ({values[0]} and {values[1]}), so the same "
                    "weights mean different things in them. Only models of one architecture can be merged."
                )
        _check_layer_types(first, source, one, other, names)


def _meaning(key: str, value: Any) -> Any:
    return _SAME_ACTIVATION.get(value, value) if isinstance(value, str) else value


def _check_layer_types(first: Source, source: Source, one: InputModel, other: InputModel, names: str) -> None:
    kinds: list[Any] = [one.text_config.get("layer_types"), other.text_config.get("layer_types")]
    starts = [(part.layer_range or (0, 0))[0] for part in (first, source)]
    count = (first.layer_range or (0, 0))[1] - starts[0]
    if not all(isinstance(kind, list) for kind in kinds):
        return
    for i in range(count):
        pair = [kind[start + i] for kind, start in zip(kinds, starts, strict=True) if start + i < len(kind)]
        if len(pair) == 2 and pair[0] != pair[1]:
            raise ValueError(
                f"Layer {starts[0] + i} of {str(first.model)!r} is of kind {pair[0]!r} and layer {starts[1] + i} of "
                f"{str(source.model)!r} of kind {pair[1]!r} (`layer_types`). Choose `layer_range`s of equal kinds."
            )


def check_layers_are_there(model: InputModel) -> None:
    """Refuse a model whose files hold fewer layers than its config.json counts, and than transformers would load.

    Models whose layers share their weights (ALBERT) store fewer.
    """
    part = layer_config(model.config, "text_decoder")
    stated = part[layer_keys(part, "text_decoder")[0]] if part is not None else 0
    count = layer_count(model, "text_decoder")
    if not 0 < count < stated:
        return
    try:
        needed = {split[:2] for name in model.architecture.state if (split := split_layer(name))}
        stored = {split[:2] for name in model.loadings if (split := split_layer(name))}
    except ValueError:
        needed, stored = {("", 0)}, set()
    if not needed <= stored:
        raise ValueError(
            f"Model {str(model.reference)!r} should have {stated} layers by its config.json, but its files hold "
            f"{count}. Fetch the missing files, or fix the config."
        )
