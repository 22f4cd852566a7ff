"""A shallower student from the last layers of the teacher."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_transfer_ext.students.layers import depths, keep_layers
from hf_transfer_ext.students.shape import StudentShape


def last_depth(teacher: PreTrainedModel, shape: StudentShape) -> PreTrainedModel:
    """Keep the last `shape.depth` layers, those closest to the output; everything else is copied.

    The first of them receives the embeddings, which it was not trained on: expect a worse start than `uniform_depth`.

    When to use it: as a baseline, or where the last layers alone were fine-tuned for the task.

    Args:
        shape: The shape of the student: depth from 1 to the teacher's, everything else as in the teacher. With all
            layers the student equals the teacher.

    Returns:
        A new model of the teacher's class that shares no memory with it.

    Source: "bottom-layer dropping" in Sajjad et al. 2020, On the Effect of Dropping Layers of Pre-trained Transformer
    Models, https://arxiv.org/abs/2004.03844
    """
    depth, theirs = depths(teacher, shape, "last_depth", at_most_teacher=True)
    return keep_layers(teacher, range(theirs - depth, theirs))
