from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.hidden.hidden_mse import projected


def squared_error(
    student: Float[Tensor, "sides rows width"], teacher: Float[Tensor, "sides rows teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None = None,
) -> Float[Tensor, " rows"]:  # fmt: skip
    r"""Squared distance of the vectors, after a learned projection where the widths differ.

    .. math:: | W x_S - x_T |^2

    When to use it: the student's vectors are to replace the teacher's in an index that exists; scores of a regression;
    logits of a classifier, as an alternative to a divergence.

    Args:
        projection: W, trained along; None for equal widths.

    Returns:
        For each row, >= 0; a mean over the sides of a pair.

    Source: Ba and Caruana 2014, equation 1, https://arxiv.org/abs/1312.6184; for sentence vectors Reimers and Gurevych
    2020, https://arxiv.org/abs/2004.09813
    """
    pairs = zip(student, teacher, strict=True)
    differences = [projected(own, other, projection) - other.detach().float() for own, other in pairs]
    return sum(one.square().sum(-1) for one in differences) / len(differences)  # type: ignore[return-value]
