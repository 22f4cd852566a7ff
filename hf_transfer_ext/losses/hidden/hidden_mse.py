from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.layer_reading import reads


@reads("states")
def hidden_mse(
    student: Float[Tensor, "tokens width"], teacher: Float[Tensor, "tokens teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None = None,
    *,
    relative: bool = True,
) -> Float[Tensor, " tokens"]:  # fmt: skip
    r"""Squared difference of hidden states, after a learned projection where the widths differ.

    .. math:: \frac{| W h_S - h_T |^2}{| h_T |^2}, \quad \text{or} \quad \frac{1}{d} | W h_S - h_T |^2

    Deviation from the paper: it has the second form, for models that normalize their hidden states after each layer.
    In decoders that normalize before each layer, states grow with the depth (a mean square of 10^5 is usual), and the
    second form drowns every other loss; the first does not depend on their size.

    When to use it: a student that was cut out of its teacher, beside a divergence; mapped layers in one space learn
    fast. With a projection it helps less.

    Args:
        projection: W, trained along; None for equal widths.
        relative: In proportion to the size of the teacher's state; False for the mean over the dimensions.

    Returns:
        For each token, >= 0; 1 for a student's state of zeros, where `relative`.

    Source: TinyBERT, Jiao et al. 2020, equation 8, https://arxiv.org/abs/1909.10351
    """
    return squared_distance(projected(student, teacher, projection), teacher.detach(), relative=relative)


def squared_distance(
    one: Float[Tensor, "tokens width"], other: Float[Tensor, "tokens width"], *, relative: bool
) -> Float[Tensor, " tokens"]:
    """Mean square of the difference, or, where `relative`, its square in proportion to that of `other`."""
    other = other.float()
    difference = (one.float() - other).square().mean(-1)
    if not relative:
        return difference
    size = other.detach().square().mean(-1)
    return difference / size.clamp(min=torch.finfo(size.dtype).tiny)


def projected(
    student: Float[Tensor, "tokens width"], teacher: Float[Tensor, "tokens teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None,
) -> Float[Tensor, "tokens teacher_width"]:  # fmt: skip
    """The student's states in the teacher's space, in float32."""
    if projection is None:
        if student.shape != teacher.shape:
            raise ValueError(
                f"The student's hidden states have width {student.shape[1]}, the teacher's {teacher.shape[1]}: a "
                "`projection` is needed."
            )
        return student.float()
    return student.float() @ projection.float().T
