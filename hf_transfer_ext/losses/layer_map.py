"""Which layer of the student learns from which layer of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_transfer_ext.registry import Registry, unknown_name

#: (student's layer, teacher's layer), counted from 0.
Pairs = list[tuple[int, int]]


def uniform(student_layers: int, teacher_layers: int) -> Pairs:
    """Layer i of S learns from the last layer of the i-th of S equal parts of the teacher; of 2 and 4
    layers `[[0, 1], [1, 3]]`.

    When to use it: the default: each layer of the student stands for a run of the teacher's, and the last ones meet.

    Source: TinyBERT, Jiao et al. 2020, section 4.3, https://arxiv.org/abs/1909.10351
    """
    return [(i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers)]


def last(student_layers: int, teacher_layers: int) -> Pairs:
    """The student's layers learn from the last layers of the teacher; of 2 and 4 layers `[[0, 2], [1, 3]]`.

    When to use it: what counts is what the teacher has made of a text in the end; the student's first layers have to
    do the work of many, so that this is the hardest map to follow.

    Source: Patient Knowledge Distillation (PKD-Last), Sun et al. 2019, https://arxiv.org/abs/1908.09355
    """
    return [(i, teacher_layers - student_layers + i) for i in range(student_layers)]


def skip(student_layers: int, teacher_layers: int) -> Pairs:
    """Layer i of S learns from the first layer of the i-th of S equal parts of the teacher; of 2 and 4
    layers `[[0, 0], [1, 2]]`.

    When to use it: a student that was cut out of the teacher by taking these layers; beside a loss at the end of the
    network, since the teacher's last layer is not among them.

    Source: this package's own, for students that start as DistilBERT's does, from one layer out of two, Sanh et al.
    2019, section 3, https://arxiv.org/abs/1910.01108
    """
    return [(i, i * teacher_layers // student_layers) for i in range(student_layers)]


def pairs(student_layers: int, teacher_layers: int, mapping: Sequence[Sequence[int]] = ((-1, -1),)) -> Pairs:
    """Pairs of layers as they are listed, `layer_map: [[0, 1], [-1, -1]]`, that count from 0; -1 is the last one.

    When to use it: a student that is deeper than its teacher, or a loss that is meant for one layer alone:
    `[[-1, -1]]` for minilm and attention_relation.

    Raises:
        ValueError: A layer does not exist, or is named twice on the student's side.
    """
    found = []
    for student, teacher in mapping:
        for side, layer, count in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
            if not -count <= layer < count:
                raise ValueError(
                    f"The pair ({student}, {teacher}) names layer {layer} of the {side}, which has {count} layers: 0 "
                    f"to {count - 1}, or -1 for the last one."
                )
        found.append((student % student_layers, teacher % teacher_layers))
    if len({student for student, _ in found}) < len(found) or not found:
        raise ValueError(f"A layer map needs pairs with different layers of the student, got {list(mapping)}.")
    return found


_NAMED: list[Callable[[int, int], Pairs]] = [uniform, last, skip]
#: Layer maps by name.
LAYER_MAPS = Registry("layer map", _NAMED)
#: The ways to write a `layer_map`.
LAYER_MAP_FORMS: dict[str, Callable[..., Pairs]] = {**dict(LAYER_MAPS.items()), "pairs": pairs}


def layer_pairs(mapping: str | Sequence[Sequence[int]], student_layers: int, teacher_layers: int) -> Pairs:
    """(student's layer, teacher's layer), counted from 0.

    Args:
        mapping: A name of `LAYER_MAPS`, or pairs of layers.

    Raises:
        ValueError: A layer does not exist, is named twice on the student's side, or the student is deeper than the
            teacher.
    """
    if student_layers < 1 or teacher_layers < 1:
        raise ValueError(f"Both models need layers, got {student_layers} and {teacher_layers}.")
    if not isinstance(mapping, str):
        return pairs(student_layers, teacher_layers, mapping)
    by_name = LAYER_MAPS[mapping]
    if student_layers > teacher_layers:
        raise ValueError(
            f"The layer map {mapping!r} needs a teacher that is at least as deep as the student, got {teacher_layers} "
            f"and {student_layers} layers. Name pairs of layers."
        )
    return by_name(student_layers, teacher_layers)


def check_layer_map(mapping: Any, where: str) -> None:
    """Refuse what is neither the name of a layer map nor pairs of layers.

    Args:
        where: The setting, for messages.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(mapping, str):
        if mapping not in LAYER_MAPS:
            raise ValueError(unknown_name("layer map", mapping, LAYER_MAPS))
        return
    is_list = isinstance(mapping, (list, tuple)) and len(mapping) > 0
    if not is_list or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in mapping):
        raise ValueError(f"{where} has to be a name or pairs of layers [[0, 1], ...], got {mapping!r:.200}.")
    if not all(type(layer) is int for pair in mapping for layer in pair):
        raise ValueError(f"{where} has to name layers by their numbers, got {mapping!r:.200}.")
