from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.hidden.hidden_mse import projected
from hf_transfer_ext.losses.layer_reading import reads


@reads("features")
def feature_norm_direction(
    student: Float[Tensor, "tokens width"],
    teacher: Float[Tensor, "tokens teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None,
    directions: Float[Tensor, "tokens teacher_width"],
) -> Float[Tensor, " tokens"]:
    r"""Features as large as the teacher's, in the direction of the label (the ND loss).

    .. math:: 1 - \frac{W h_S \cdot c_y}{\max(|W h_S|, |h_T|)}, \quad c_y = \text{direction of class } y, |c_y| = 1

    A student with smaller features than the teacher's is drawn to larger ones, too; from the teacher's norm on, only
    the angle counts.

    Deviation from the paper: its c_y is the mean of the teacher's features of class y over the training set. A
    vocabulary has too many classes for that; here the teacher's own row of the head for the label stands for it, the
    direction in which features raise that label's logit.

    When to use it: beside a divergence, where the student's features stay small, as those of a much smaller model do;
    the paper's weights are .5 to 4.

    Args:
        student: What the student's head reads at the positions that predict a label.
        teacher: The same of the teacher.
        projection: W, trained along; None for equal widths.
        directions: The teacher's row of the head for each label; normalized here.

    Returns:
        For each token, from 0 to 2.

    Source: Improving Knowledge Distillation via Regularizing Feature Norm and Direction, Wang et al. 2023,
    https://arxiv.org/abs/2305.17007
    """
    own = projected(student, teacher, projection)
    unit = torch.nn.functional.normalize(directions.detach().float(), dim=-1)
    larger = torch.maximum(own.norm(dim=-1), teacher.detach().float().norm(dim=-1))
    return 1 - (own * unit).sum(-1) / larger.clamp(min=torch.finfo(own.dtype).tiny)
