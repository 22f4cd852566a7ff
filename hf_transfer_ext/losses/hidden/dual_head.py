from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.layer_reading import reads


@reads("logits")
def dual_head(
    student: Float[Tensor, "tokens classes"],
    teacher: Float[Tensor, "tokens classes"],
    *,
    temperature: float = 2.0,
    top: int = 64,
) -> Float[Tensor, " tokens"]:
    r"""Raw logits of an auxiliary head drawn to the teacher's; the student's own head learns from labels alone.

    .. math:: \frac{T^2}{K} \sum_{v \in top} \log \cosh \frac{s_v - t_v}{2 T}

    which is :math:`\frac{T^2}{K} \sum_v KL(B(1/2) \| B(\sigma((s_v - t_v) / T)))` for K tokens, with a gradient of at
    most T / 2K for each logit. A constant that is added to all logits changes it, unlike a divergence of softmaxes.

    The auxiliary head is trained along, starts as the student's own and is dropped in the end; it is as large as that.
    The paper sums over all classes; here it is a mean over the teacher's likeliest ones, since the raw logits of
    language models are far apart, and their sum drowns every other loss. The alignment of the gradients of both heads
    is left out.

    When to use it: with cross entropy (`ce_weight: 1`, `kd_weight: 0`), where labels and teacher pull one head in
    different directions; the paper's weights of its sum over 100 classes are .1 and 1.

    Args:
        student: Logits of the auxiliary head.
        teacher: The teacher's logits for the same tokens.
        temperature: T > 0.
        top: Likeliest tokens of the teacher that count, >= 1.

    Returns:
        For each token, >= 0; 0 where the logits are equal.

    Raises:
        ValueError: An option is out of its range.

    Source: Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head, Yang et al. 2024,
    https://arxiv.org/abs/2411.08937
    """
    if not temperature > 0 or top < 1:
        raise ValueError(f"dual_head needs `temperature` > 0 and `top` >= 1, got {temperature} and {top}.")
    student, teacher = student.float(), teacher.detach().float()
    if teacher.shape[1] > top:
        teacher, ids = teacher.topk(top, dim=-1)
        student = student.gather(1, ids)
    half = ((student - teacher) / (2 * temperature)).abs()
    return temperature**2 * (half + torch.nn.functional.softplus(-2 * half) - math.log(2)).mean(-1)
