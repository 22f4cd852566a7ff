"""Losses between vectors of whole texts: sentence embeddings, scores, logits. One file each.

Each is `loss(student, teacher, projection, **options)`, with one vector for each text of each row: `(sides, rows,
width)`, one side for single texts and two for pairs. It returns one value for each row.
"""

from collections.abc import Callable

from torch import Tensor

from hf_transfer_ext.losses.vectors.cosine_distance import cosine_distance
from hf_transfer_ext.losses.vectors.lealla import lealla
from hf_transfer_ext.losses.vectors.similarity_mse import similarity_mse
from hf_transfer_ext.losses.vectors.squared_error import squared_error
from hf_transfer_ext.registry import Registry

_LOSSES: list[Callable[..., Tensor]] = [squared_error, cosine_distance, similarity_mse, lealla]
VECTOR_LOSSES = Registry("loss between vectors", _LOSSES)

__all__ = ["VECTOR_LOSSES", *VECTOR_LOSSES]
