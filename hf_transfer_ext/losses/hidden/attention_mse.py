from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_transfer_ext.losses.layer_reading import reads


@reads("scores")
def attention_mse(
    student: Float[Tensor, "batch heads length length"],
    teacher: Float[Tensor, "batch teacher_heads length length"],
    mask: Bool[Tensor, "batch length"],
    *,
    relative: bool = True,
) -> Float[Tensor, "batch length"]:
    r"""Squared difference of attention scores, before their softmax.

    .. math:: \frac{\sum_{a,s} (A^S_{ats} - A^T_{ats})^2}{\sum_{a,s} (A^T_{ats})^2}, \quad \text{or} \quad
              \frac{1}{h n_t} \sum_{a=1}^{h} \sum_{s} (A^S_{ats} - A^T_{ats})^2

    over the h heads and the n_t positions s that t may look at in both models. Other numbers of heads are averaged in
    equal groups first, as far as they divide each other.

    Deviation from the paper: it has the second form. Scores of decoders are large (a mean square of 50 is usual), and
    that form drowns every other loss.

    When to use it: teacher and student have alike heads, as where the one was cut out of the other; it needs memory of
    heads times length squared.

    Args:
        student: Scores, -inf (or the smallest number of the dtype) where nothing is looked at.
        teacher: The same.
        mask: True at tokens that are not padding.
        relative: In proportion to the size of the teacher's scores; False for the mean.

    Returns:
        For each token that looks, >= 0; 0 at padding.

    Source: TinyBERT, Jiao et al. 2020, equation 7, https://arxiv.org/abs/1909.10351
    """
    student, teacher = student.float(), teacher.detach().float()
    least = torch.finfo(torch.float16).min  # what models write for "not at all" is at most this
    seen = (student > least).all(1) & (teacher > least).all(1) & mask[:, :, None] & mask[:, None, :]
    student, teacher = (side.masked_fill(~seen[:, None], 0.0) for side in (student, teacher))
    heads = min(student.shape[1], teacher.shape[1])
    theirs = _grouped(teacher, heads)
    difference = (_grouped(student, heads) - theirs).square().mean(1).sum(-1)
    if relative:
        return difference / theirs.square().mean(1).sum(-1).clamp(min=torch.finfo(theirs.dtype).tiny)
    return difference / seen.sum(-1).clamp(min=1)


def _grouped(scores: Tensor, heads: int) -> Tensor:
    if scores.shape[1] % heads:
        raise ValueError(
            f"{scores.shape[1]} attention heads cannot be averaged to {heads} in equal groups. Use "
            "`attention_relation`, which has heads of its own."
        )
    return scores.unflatten(1, (heads, -1)).mean(2)
