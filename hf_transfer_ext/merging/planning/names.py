"""The names of tensors: which layer and module they belong to, and which names of two files mean the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.weights.opened import InputModel

_LAYER = re.compile(r"^(?P<stack>(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*)\.(?P<index>\d+)\.(?P<rest>.+)$")

#: Parts of a model beside its text: towers for images and sound, projectors, multi-token prediction.
_BESIDE_TEXT = re.compile(r"(^|\.)(vision\w*|visual|image\w*|video\w*|audio\w*|mtp|mm_\w+|multi_modal\w*)(\.|$)")

#: mergekit's name of the language model of a vision-language model.
TEXT_MODULES = ("text_decoder", "text_model")

#: The keys under which configs write the number of layers.
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

#: Those of encoder-decoder models and vision towers, by module.
_MODULE_KEYS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "n_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "n_decoder_layers"),
}


@lru_cache(maxsize=1 << 18)
def split_layer(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.weight` -> `("model.layers", 3, "mlp.weight")`; None for a tensor outside the layers."""
    match = _LAYER.match(name)
    return (match["stack"], int(match["index"]), match["rest"]) if match else None


def short_list(names: Sequence[str], most: int = 5) -> str:
    """Some names, and how many there are beside them."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def belongs_to(name: str, module: str, model: InputModel) -> bool:
    """Whether a tensor is part of a module; "default" has all of them."""
    if module == "default":
        return True
    if module in TEXT_MODULES and module not in model.parts:
        return not _BESIDE_TEXT.search(name)
    return module in name.split(".")


def check_modules(modules: Sequence[str], models: Sequence[InputModel]) -> None:
    """Refuse modules that no model has a tensor of.

    Raises:
        ValueError: The name and the parts that hold layers are named.
    """
    for module in modules:
        if module == "default" or module in TEXT_MODULES:
            continue
        if not any(module in model.parts for model in models):
            stacks = {split[0] for model in models for name in model.tensors if (split := split_layer(name))}
            known = sorted({part for stack in stacks for part in stack.split(".")} | {"default"})
            raise ValueError(f"`modules`: {unknown_name('part of the models', module, known)}")


def layer_count(model: InputModel, module: str = "default") -> int:
    """Number of layers of a model, or of the longest stack of a module; 0 where it has none.

    Layers that transformers does not load (multi-token prediction, stored as one more layer) do not count.
    """
    counts: dict[str, int] = {}
    for name in model.tensors:
        split = split_layer(name)
        if split is not None and belongs_to(name, module, model):
            counts[split[0]] = max(counts.get(split[0], 0), split[1] + 1)
    count = max(counts.values(), default=0)
    part = layer_config(model.config, module)
    if part is None or count <= (stated := part[layer_keys(part, module)[0]]):
        return count
    further = [name for name in model.tensors if (split := split_layer(name)) and split[1] >= stated]
    further = [name for name in further if belongs_to(name, module, model) and name not in model.unloaded]
    return max((split[1] + 1 for name in further if (split := split_layer(name))), default=stated)


def layer_config(content: dict[str, Any], module: str) -> dict[str, Any] | None:
    """The (part of the) config that counts the layers of a module; None where there is none."""
    named = [content.get(f"{module}_config"), content.get(module)]
    if module.startswith(("vision", "visual", "image", "audio", "video")):
        kind = "audio" if module.startswith("audio") else "vision"
        named += [content.get(f"{kind}_config")]
    elif module not in _MODULE_KEYS:
        named += [content.get("text_config"), content]
    else:
        named += [content, content.get("text_config")]
    return next((part for part in named if isinstance(part, dict) and layer_keys(part, module)), None)


def layer_keys(part: dict[str, Any], module: str) -> list[str]:
    """The keys by which a part of a config counts the layers of a module, the decisive one first."""
    keys = [*_MODULE_KEYS.get(module, ()), *LAYER_COUNT_KEYS, "depth"]
    found = [key for key in keys if isinstance(part.get(key), int) and not isinstance(part.get(key), bool)]
    own = [key for key in found if key in _MODULE_KEYS.get(module, ())]
    return own + [key for key in found if key not in own] if module != "decoder" or not own else own


def align_names(models: Sequence[InputModel]) -> None:
    """Rename the tensors of models as those of the first one are named, where they become the same parameters.

    Files of other versions of transformers, and those saved from a part of the model, name tensors differently. Where
    the names are equal, or those of one model are among those of the other, nothing is done (and transformers is not
    imported).
    """
    first, *others = models
    known = _signature(first.tensors)
    for model in others:
        names = _signature(model.tensors)
        if names <= known or known <= names:
            continue
        try:
            own = first.architecture.parameters_of(first.tensors)
            found = first.architecture.parameters_of(model.tensors)
        except ValueError:
            continue  # transformers does not know the architecture, so names have to be equal
        stored = {parameter: name for name, parameter in own.items() if parameter is not None}
        renamed = {}
        for name in model.tensors:
            target = stored.get(found[name] or "")
            if name not in first.tensors and target is not None and target not in model.tensors:
                renamed[name] = target
        model.tensors = {renamed.get(name, name): tensor for name, tensor in model.tensors.items()}
        model.copies = {name: renamed.get(source, source) for name, source in model.copies.items()}
        for known_by_names in ("unloaded", "parts"):
            model.__dict__.pop(known_by_names, None)


def _signature(names: Iterable[str]) -> set[str]:
    """Names without the numbers of layers, so that models of different depth have equal ones."""
    return {f"{split[0]}.*.{split[2]}" if (split := split_layer(name)) else name for name in names}
