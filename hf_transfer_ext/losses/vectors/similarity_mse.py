from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def similarity_mse(
    student: Float[Tensor, "sides rows width"], teacher: Float[Tensor, "sides rows teacher_width"],
    projection: Float[Tensor, "teacher_width width"] | None = None,
) -> Float[Tensor, " rows"]:  # fmt: skip
    r"""Mean squared difference of the cosines between a row and all rows of the batch, in the student and the teacher.

    .. math:: \frac{1}{n} \sum_j \big( \cos(x_i^S, y_j^S) - \cos(x_i^T, y_j^T) \big)^2

    x is the first side of a pair and y the second; both are the same for single texts. It compares relations, so that
    the models need not have vectors of one width or one space, and it depends on which rows share a batch.

    When to use it: a student with its own, narrower vectors; ranking matters and the vectors themselves do not.

    Args:
        projection: Not used: relations need none.

    Returns:
        For each row, from 0 to 4.

    Source: LEALLA's logit distillation, Mao and Nakagawa 2023, https://arxiv.org/abs/2302.08387; for single texts
    Park et al. 2019, https://arxiv.org/abs/1904.05068, with cosines instead of distances
    """
    cosines = [normalize(x[0].float(), dim=-1) @ normalize(x[-1].float(), dim=-1).T for x in (student, teacher)]
    return (cosines[0] - cosines[1].detach()).square().mean(-1)
