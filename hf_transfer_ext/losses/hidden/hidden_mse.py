from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.layer_reading import reads


@reads("states")
def hidden_mse(
    student: Float[Tensor, "tokens width"], teacher: Float[Tensor, "tokens teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None = None,
) -> Float[Tensor, " tokens"]:  # fmt: skip
    r"""Mean squared difference of hidden states, after a learned projection where the widths differ.

    .. math:: \frac{1}{d} | W h_S - h_T |^2

    When to use it: a student that was cut out of its teacher, beside a divergence; mapped layers in one space learn
    fast. With a projection it helps less.

    Args:
        projection: W, trained along; None for equal widths.

    Returns:
        For each token, >= 0.

    Source: TinyBERT, Jiao et al. 2020, equation 8, https://arxiv.org/abs/1909.10351
    """
    return (projected(student, teacher, projection) - teacher.detach().float()).square().mean(-1)


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
