"""Losses between layers, as `DistillationConfig` names them: one name, or a list with an entry for each loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.losses.layer_map import check_layer_map
from hf_transfer_ext.losses.layer_reading import (
    AT_HEADS,
    OF_STATES,
    Reading,
    default_weight,
    hidden_options,
    reading_of,
)
from hf_transfer_ext.models.layer_views import SIDES, Side
from hf_transfer_ext.registry import keyword_options, unknown_name
from hf_transfer_ext.settings import from_json


@dataclass(frozen=True)
class NamedHiddenLoss:
    """One entry of `hidden_loss`.

    Args:
        name: A name of `HIDDEN_LOSSES`.
        weight: Factor of this loss, > 0, beside `hidden_weight`, which is a factor of all. Left out, it is the loss's
            own: 0.1 of minilm and attention_relation, 1 of the others.
        layer_map: As the setting of that name, which is the default.
        embeddings: As `hidden_embeddings`, which is the default of losses that read hidden states.
        options: The loss's own options.
        side: Of encoder-decoders: "encoder" compares the layers of the encoders, "decoder", the default, those of the
            decoders. A list may name a loss once for each.
    """

    name: str
    weight: float = 1.0
    layer_map: Any = "uniform"
    embeddings: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    side: Side | None = None

    @property
    def label(self) -> str:
        """What the loss is called in logs: its name, followed by `_encoder` where it compares encoders."""
        return f"{self.name}_encoder" if self.side == "encoder" else self.name

    @property
    def reading(self) -> Reading:
        """What the loss reads of each layer."""
        return reading_of(HIDDEN_LOSSES[self.name])


def named_hidden_losses(args: Any) -> list[NamedHiddenLoss]:
    """The losses between layers that a `DistillationConfig` names; an empty list where it names none.

    Raises:
        ValueError: A loss or an option is unknown, a value is out of its range, or a setting would have no effect.
    """
    listed, options = from_json(args.hidden_loss), dict(args.hidden_options or {})
    mapping = "uniform" if args.layer_map is None else from_json(args.layer_map)
    if listed is None:
        defaults = {"hidden_options": {}, "hidden_weight": 1.0, "layer_map": "uniform", "hidden_embeddings": False}
        values = {"hidden_options": options, "layer_map": mapping}
        stated = [one for one, default in defaults.items() if values.get(one, getattr(args, one)) != default]
        if stated:
            raise ValueError(f"`{stated[0]}` is given, but no `hidden_loss`. Name one of {', '.join(HIDDEN_LOSSES)}.")
        return []
    check_layer_map(mapping, "`layer_map`")
    if not 0 < args.hidden_weight < math.inf:
        raise ValueError(f"`hidden_weight` must be > 0, got {args.hidden_weight}. Leave `hidden_loss` out instead.")
    if isinstance(listed, str):
        found = [_of_entry({"name": listed, "options": options, "weight": 1.0}, "`hidden_loss`")]
    elif isinstance(listed, (list, tuple)) and listed:
        if options:
            raise ValueError(
                "`hidden_options` are the options of one loss, but `hidden_loss` is a list. Put them into its "
                "entries: {name: attention_relation, options: {heads: 8}}."
            )
        entries = [{"name": one} if isinstance(one, str) else one for one in listed]
        found = [_of_entry(one, f"Entry {place} of `hidden_loss`") for place, one in enumerate(entries)]
    else:
        raise ValueError(
            "`hidden_loss` has to be a name, or a list of names and of mappings such as {name: hidden_mse, weight: "
            f".5}}, got {listed!r:.200}."
        )
    losses = _with_defaults(found, mapping, args.hidden_embeddings)
    names = [one.label for one in losses]
    if len(set(names)) < len(names):
        raise ValueError(f"`hidden_loss` names a loss twice: {', '.join(names)}. Put its layers into one `layer_map`.")
    return losses


def default_hidden_weight(hidden_loss: Any) -> float:
    """`hidden_weight` where it is left out: the own weight of one loss; 1 of a list, whose entries have theirs."""
    is_one = isinstance(hidden_loss, str) and hidden_loss in HIDDEN_LOSSES
    return default_weight(HIDDEN_LOSSES[hidden_loss]) if is_one else 1.0


def refuse_side(losses: list[NamedHiddenLoss], task: str) -> None:
    """Refuse losses that name a `side`, for a task whose models have one stack of layers.

    Raises:
        ValueError: One names it.
    """
    for one in losses:
        if one.side is not None:
            raise ValueError(
                f"`side` of {one.name} is {one.side!r}, but the models of the task {task} are not encoder-decoders: "
                "they have one stack of layers. Leave `side` out."
            )


def _of_entry(entry: Any, where: str) -> dict[str, Any]:
    """An entry with its own settings checked."""
    known = [one.name for one in fields(NamedHiddenLoss)]
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"{where} has to be a name or a mapping with `name`, got {entry!r:.200}.")
    for key in entry:
        if key not in known:
            raise ValueError(f"{where}: {unknown_name('setting', key, known)}")
    loss = HIDDEN_LOSSES[entry["name"]]
    weight, options = entry.get("weight", default_weight(loss)), entry.get("options") or {}
    if not _is_number(weight) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: `weight` has to be a number > 0, got {weight!r}. Leave out a loss without weight.")
    if not isinstance(entry.get("embeddings", False), bool):
        raise ValueError(f"{where}: `embeddings` has to be true or false, got {entry['embeddings']!r}.")
    if entry.get("side") is not None and entry["side"] not in SIDES:
        raise ValueError(f"{where}: {unknown_name('side', entry['side'], SIDES)}")
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: `options` has to be a mapping, got {options!r:.200}.")
    for name, value in options.items():
        allowed = hidden_options(loss)
        if name not in allowed:
            raise ValueError(unknown_name(f"option of {entry['name']}", name, allowed or ["(it has none)"]))
        default = keyword_options(loss)[name]
        fits = type(value) is type(default) or (isinstance(default, float) and _is_number(value))
        if not fits:
            raise ValueError(
                f"`{name}` of {entry['name']} has to be of type {type(default).__name__}, such as {default}, got "
                f"{value!r}."
            )
    if "layer_map" in entry:
        check_layer_map(entry["layer_map"], f"{where}: `layer_map`")
    _check_ranges(loss, options)
    return {**entry, "weight": weight, "options": dict(options)}


def _check_ranges(loss: Any, options: Mapping[str, Any]) -> None:
    """Let a loss refuse values out of its range, by a call on one token; its `heads` are the dimensions of a state."""
    text, mask = torch.zeros(1, 1, max(1, options.get("heads", 1))), torch.ones(1, 1, dtype=torch.bool)
    if reading_of(loss) == "logits":
        loss(torch.zeros(1, 2), torch.zeros(1, 2), **options)
    elif reading_of(loss) in ("sequences", "relations"):
        loss(text, text, mask, **options)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _with_defaults(entries: list[dict[str, Any]], mapping: Any, embeddings: bool) -> list[NamedHiddenLoss]:
    """The entries with what the configuration says for all; refuses what none of them would obey."""
    found, takes_map, takes_embeddings = [], False, False
    for entry in entries:
        name, reading = entry["name"], reading_of(HIDDEN_LOSSES[entry["name"]])
        if reading in AT_HEADS and ("layer_map" in entry or entry.get("embeddings")):
            raise ValueError(
                f"{name} compares what the heads read, and no layers: leave `layer_map` and `embeddings` out."
            )
        if entry.get("embeddings") and reading not in OF_STATES:
            raise ValueError(f"`embeddings` is set, but {name} {_NO_EMBEDDINGS[reading]}. Leave it out.")
        if reading not in AT_HEADS and "layer_map" not in entry:
            entry, takes_map = {**entry, "layer_map": mapping}, True
        if reading in OF_STATES and "embeddings" not in entry:
            entry, takes_embeddings = {**entry, "embeddings": embeddings}, True
        found.append(NamedHiddenLoss(**entry))
    names = ", ".join(one.name for one in found)
    if (mapping != "uniform" and not takes_map) or (embeddings and not takes_embeddings):
        at_heads = all(one.reading in AT_HEADS for one in found)
        if at_heads:
            raise ValueError(
                f"{names} compares what the heads read, and no layers: leave `layer_map` and `hidden_embeddings` out."
            )
        if mapping != "uniform" and not takes_map:
            raise ValueError("`layer_map` has no effect: each entry of `hidden_loss` has its own. Leave it out.")
        why = _NO_EMBEDDINGS.get(found[0].reading, "has its own setting")
        raise ValueError(
            f"`hidden_embeddings` is set, but {names} {why}. Leave it out, or add a loss that reads hidden states, "
            "such as hidden_mse."
        )
    return found


#: Why a loss with this reading does not compare embeddings.
_NO_EMBEDDINGS: dict[Reading, str] = {
    "relations": "reads attention, which embeddings do not have",
    "scores": "reads attention, which embeddings do not have",
    "attention": "reads attention, which embeddings do not have",
    "messages": "cuts both models at one layer",
    "features": "compares what the heads read",
    "logits": "compares what the heads read",
}
