"""A shallower student from evenly spaced layers of the teacher."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_transfer_ext.students.layers import depths, keep_layers
from hf_transfer_ext.students.shape import StudentShape


def uniform_depth(teacher: PreTrainedModel, shape: StudentShape) -> PreTrainedModel:
    r"""Keep `shape.depth` evenly spaced layers, including the first and the last; everything else is copied.

    .. math:: l_i = \left\lfloor \frac{i (L - 1)}{n - 1} + \frac12 \right\rfloor, \quad i = 0 \dots n - 1

    of the teacher's layers 0 to L-1; a depth of 1 keeps the first. With all layers the student equals the teacher.

    When to use it: first: a student of the teacher's width and fewer layers, to be trained at once.

    Args:
        shape: The shape of the student: depth n from 1 to the teacher's depth L, everything else as in the teacher.

    Returns:
        A new model of the teacher's class that shares no memory with it.

    Source: DistilBERT, Sanh et al. 2019, https://arxiv.org/abs/1910.01108, which takes every other layer; the rounding
    for other depths, with both ends kept, is our own.
    """
    depth, theirs = depths(teacher, shape, "uniform_depth", at_most_teacher=True)
    return keep_layers(teacher, evenly_spaced(theirs, depth))


def evenly_spaced(depth: int, count: int) -> list[int]:
    """`count` of the numbers 0 to `depth - 1`, evenly spaced, both ends included: (6, 3) gives 0, 3, 5."""
    if count == 1:
        return [0]
    return [(2 * i * (depth - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]
