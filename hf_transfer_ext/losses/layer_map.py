"""Which layer of the student learns from which layer of the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from hf_transfer_ext.registry import unknown_name

LAYER_MAPS = ("uniform", "last", "skip")


def layer_pairs(
    mapping: str | Sequence[Sequence[int]], student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer), counted from 0.

    Args:
        mapping: "uniform": student's layer i of S learns from the last layer of the i-th of S equal parts of the
            teacher. "last": the last S layers of the teacher. "skip": the first layer of each part, which passes over
            the rest. Or pairs of layers; -1 is the last one.

    Raises:
        ValueError: A layer does not exist, is named twice on the student's side, or the student is deeper than the
            teacher.
    """
    if student_layers < 1 or teacher_layers < 1:
        raise ValueError(f"Both models need layers, got {student_layers} and {teacher_layers}.")
    if not isinstance(mapping, str):
        found = []
        for student, teacher in mapping:
            for side, layer, count in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
                if not -count <= layer < count:
                    raise ValueError(
                        f"The pair ({student}, {teacher}) names layer {layer} of the {side}, which has {count} "
                        f"layers: 0 to {count - 1}, or -1 for the last one."
                    )
            found.append((student % student_layers, teacher % teacher_layers))
        if len({student for student, _ in found}) < len(found) or not found:
            raise ValueError(f"A layer map needs pairs with different layers of the student, got {list(mapping)}.")
        return found
    if mapping not in LAYER_MAPS:
        raise ValueError(unknown_name("layer map", mapping, LAYER_MAPS))
    if student_layers > teacher_layers:
        raise ValueError(
            f"The layer map {mapping!r} needs a teacher that is at least as deep as the student, got {teacher_layers} "
            f"and {student_layers} layers. Name pairs of layers."
        )
    own = range(student_layers)
    if mapping == "last":
        return [(i, teacher_layers - student_layers + i) for i in own]
    if mapping == "uniform":
        return [(i, (i + 1) * teacher_layers // student_layers - 1) for i in own]
    return [(i, i * teacher_layers // student_layers) for i in own]
