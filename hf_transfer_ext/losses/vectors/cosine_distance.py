from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hf_transfer_ext.losses.hidden.hidden_mse import projected


def cosine_distance(
    student: Float[Tensor, "sides rows width"], teacher: Float[Tensor, "sides rows teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None = None,
) -> Float[Tensor, " rows"]:  # fmt: skip
    r"""One minus the cosine of the vectors, after a learned projection where the widths differ.

    .. math:: 1 - \cos(W x_S, x_T)

    When to use it: only the direction of a vector is used afterwards, as in most search by similarity.

    Args:
        projection: W, trained along; None for equal widths.

    Returns:
        For each row, from 0 to 2; a mean over the sides of a pair.

    Source: Sanh et al. 2019, section 3, https://arxiv.org/abs/1910.01108
    """
    pairs = zip(student, teacher, strict=True)
    cosines = [
        cosine_similarity(projected(own, other, projection), other.detach().float(), dim=-1) for own, other in pairs
    ]
    return 1.0 - sum(cosines) / len(cosines)  # type: ignore[return-value]
