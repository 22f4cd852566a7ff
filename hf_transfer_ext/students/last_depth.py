"""A shallower student from the last layers of the teacher."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_transfer_ext.students.layers import check_depth, keep_layers


def last_depth(teacher: PreTrainedModel, *, num_layers: int) -> PreTrainedModel:
    """Keep the last `num_layers` layers, those nearest to the output; everything else is copied.

    The kept layers read the embeddings, which they have never seen: this start is rougher than `uniform_depth`.

    Args:
        num_layers: The student's depth, 1 to the teacher's depth. With all layers the student equals the teacher.

    Returns:
        A new model of the teacher's class that shares no memory with it.

    Source: "bottom-layer dropping" in Sajjad et al. 2020, On the Effect of Dropping Layers of Pre-trained Transformer
    Models, https://arxiv.org/abs/2004.03844
    """
    depth = check_depth(teacher, num_layers, at_most_teacher=True)
    return keep_layers(teacher, range(depth - num_layers, depth))
