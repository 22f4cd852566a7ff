"""Whether two base models have a common origin, from their weights and tokenizers, and which transfer that allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hf_transfer_ext.adapters.distance import squared_norms
from hf_transfer_ext.adapters.transfer.anchors import FEWEST_SHARED_TOKENS, even_layers, shared_tokens
from hf_transfer_ext.adapters.transfer.places import LAYER, depth_of
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.weights.opened import InputModel, open_model
from hf_transfer_ext.weights.reference import ModelReference, parse_reference

#: Largest relative distance of weights that still suggests a common origin. Independent weights of one scale are at
#: sqrt(2), since they are orthogonal in expectation; continued pretraining stays far below 0.5.
RELATED = 0.5
#: Methods that carry directions of the source to the target as they are, which only a common origin justifies.
NEEDS_ORIGIN = ("copy", "project")
#: Methods that align the models by tokens of both vocabularies.
NEEDS_TOKENS = ("cross_lora", "lorasuite")


@dataclass(frozen=True)
class Lineage:
    """What two bases have in common.

    Args:
        relation: "same" (equal weights), "related" (equal layer shapes and close weights), "unrelated" (equal layer
            shapes, distant weights) or "other shapes".
        depths: Number of layers of source and target; they are compared at equal relative depth.
        distances: Kind of layer ("q_proj", "down_proj", ...) -> norm of the difference of the weights over the norm
            of the source's; kinds whose shapes differ are missing.
        shapes: Kind of layer whose shapes differ -> shape in source and target.
        shared_tokens: Share of the target's tokens that the source has too, special tokens left out; None where a
            tokenizer is missing.
        recommended: The method to use: a closed form, "trans_lora", or "none" where the adapter fits as it is.
        reasons: Why, in sentences.
        refused: Method -> why it makes no sense between these bases.
    """

    relation: str
    depths: tuple[int, int]
    distances: dict[str, float]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    shared_tokens: float | None
    recommended: str
    reasons: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def require(self, method: str) -> None:
        """Raise a `ValueError` where `method` makes no sense between these bases."""
        if method in self.refused:
            raise ValueError(f"`{method}` makes no sense here: {self.refused[method]} Use {self.recommended}.")


def lineage(source_base: str | Path, target_base: str | Path) -> Lineage:
    """Compare two base models and recommend how to transfer an adapter between them.

    When to use it: first of all, before any transfer; it reads two models from disk and runs neither.

    The weights are read piece by piece from their files; nothing is loaded whole.

    Args:
        source_base, target_base: Folders or Hub ids (`name@revision`).

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: A model without numbered layers.
    """
    references = parse_reference(source_base, "source_base"), parse_reference(target_base, "target_base")
    source = open_model(references[0])
    try:
        target = open_model(references[1])
        try:
            depths = depth_of(source), depth_of(target)
            distances, shapes = weight_distances(source, target)
        finally:
            target.close()
    finally:
        source.close()
    return judged(depths, distances, shapes, _shared_share(*references))


def require_common_origin(method: str, source: InputModel, target: InputModel) -> None:
    """Refuse a method of `NEEDS_ORIGIN` between models whose weights have equal shapes and no common origin."""
    distances, shapes = weight_distances(source, target)
    found = judged((depth_of(source), depth_of(target)), distances, shapes, None)
    if found.relation == "unrelated":  # other shapes are refused by the method itself, layer by layer
        raise ValueError(f"`{method}` makes no sense here: {found.refused[method]} Use trans_lora, or set `force`.")


def judged(
    depths: tuple[int, int],
    distances: dict[str, float],
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    shared: float | None,
) -> Lineage:
    """Relation and recommendation from what was measured."""
    reasons: list[str] = []
    refused: dict[str, str] = {}
    same_vocabulary = shared == 1.0
    if shapes or not distances:
        kinds = "; ".join(f"{kind} {list(one)} and {list(other)}" for kind, (one, other) in shapes.items())
        reasons.append(f"The shapes of layers differ ({kinds or 'no kind of layer is in both'}).")
        for method in NEEDS_ORIGIN:
            refused[method] = "the layers have different shapes."
        relation, recommended = "other shapes", "trans_lora"
    else:
        worst = max(distances, key=lambda kind: distances[kind])
        reasons.append(f"The relative distance of the weights is at most {distances[worst]:.3g} ({worst}).")
        if distances[worst] == 0 and depths[0] == depths[1]:
            relation, recommended = "same", "none"
            reasons.append("The layers are equal: the adapter fits as it is.")
        elif distances[worst] <= RELATED:
            relation, recommended = "related", "copy"
            reasons.append("That suggests a common origin.")
            if depths[0] != depths[1]:
                recommended = "trans_lora"
                reasons.append(
                    f"But depths differ ({depths[0]} and {depths[1]}, paired by relative depth): what a change does "
                    "depends on the layers around it. A copy can be the start of the training."
                )
        else:
            relation, recommended = "unrelated", "trans_lora"
            reasons.append(f"Above {RELATED} the weights show no common origin (independent ones are at about 1.4).")
            for method in NEEDS_ORIGIN:
                refused[method] = (
                    f"the weights of the two bases have no common origin (relative distance {distances[worst]:.2f} in "
                    f"{worst}), so the directions of a change mean something else in the other one."
                )
    if shared is not None:
        reasons.append(f"The source has {shared:.0%} of the target's tokens.")
        if shared == 0.0:
            for method in NEEDS_TOKENS:
                refused[method] = "the vocabularies share no token to align the models by."
    if recommended == "trans_lora" and same_vocabulary:
        reasons.append("The vocabularies agree: transfer by training can learn logits as well as answers.")
    return Lineage(relation, depths, distances, shapes, shared, recommended, reasons, refused)


def weight_distances(
    source: InputModel, target: InputModel
) -> tuple[dict[str, float], dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Relative distance of each kind of layer over all pairs of layers, and the kinds whose shapes differ.

    A kind that only one of the models has counts as different, with an empty shape on the other side.
    """
    layers = even_layers(depth_of(source), depth_of(target))
    sums: dict[str, list[float]] = {}
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    ours = {place: name for place, name in _matrices(source)}
    theirs = {place: name for place, name in _matrices(target)}
    kinds = [{after for _, after in one} for one in (ours, theirs)]
    for after in sorted(kinds[0] ^ kinds[1]):
        model, names = (source, ours) if after in kinds[0] else (target, theirs)
        shape = next(tuple(model[name].shape) for (_, own), name in names.items() if own == after)
        shapes[_kind(after)] = (shape, ()) if after in kinds[0] else ((), shape)
    for (layer, after), name in theirs.items():
        own = ours.get((layers.get(layer, -1), after))
        if own is None:
            continue
        one, other = source[own], target[name]
        if one.shape != other.shape:
            shapes[_kind(after)] = tuple(one.shape), tuple(other.shape)
            continue
        squares = sums.setdefault(_kind(after), [0.0, 0.0])
        for part, value in enumerate(squared_norms(one, other)):
            squares[part] += value
    distances = {
        kind: math.sqrt(difference / norm) if norm > 0 else math.inf
        for kind, (difference, norm) in sums.items()
        if kind not in shapes
    }
    return distances, shapes


def _matrices(model: InputModel) -> Iterator[tuple[tuple[int, str], str]]:
    """(layer, name after it) and name of each matrix of a numbered layer."""
    for name in model.tensors:
        match = LAYER.match(name)
        if match and name.endswith(".weight") and len(model.tensors[name].shape) == 2:
            yield (int(match["layer"]), match["after"]), name


def _kind(after: str) -> str:
    return after.removesuffix(".weight").rpartition(".")[2]


def _shared_share(source: ModelReference, target: ModelReference) -> float | None:
    try:
        ours, theirs = (load_tokenizer(one.path, revision=one.revision) for one in (source, target))
    except FileNotFoundError:
        return None
    special = set(theirs.all_special_tokens) | set(ours.all_special_tokens)
    count = len([token for token in theirs.get_vocab() if token not in special])
    found = len(shared_tokens(ours, theirs))
    return found / count if found >= FEWEST_SHARED_TOKENS and count else 0.0
