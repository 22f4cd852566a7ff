from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_transfer_ext.losses.layer_reading import reads

#: Dimensions of a relation head of the teacher in the paper: 48 heads of 768 dimensions, 64 of 1024.
HEAD_WIDTH = 16


@reads("relations", weight=0.1)
def attention_relation(
    student: Float[Tensor, "batch length width"],
    teacher: Float[Tensor, "batch length teacher_width"],
    mask: Bool[Tensor, "batch length"],
    *,
    heads: int = 0,
    relative: bool = True,
    causal: bool = False,
) -> Float[Tensor, "batch length"]:
    r"""KL between the self-relations of queries, of keys, or of values: no projection, whatever the widths.

    .. math:: \frac{1}{A} \sum_{a=1}^{A} KL(R^T_{at} \| R^S_{at}), \quad
              R_a = \mathrm{softmax} \Big( \frac{X_a X_a^T}{m_a \sqrt{d_a}} \Big)

    with X split into A relation heads of width d_a, and m_a the mean square of the numbers in X_a over the text.
    MiniLM v2 adds this for Q, K and V of one layer of each model.

    Deviation from the paper: it has no m_a. But the size of values is arbitrary: values that are six times as large,
    and read by weights that are six times as small, make the same model, whose relations are then 36 times as sharp.
    In a small decoder that made the loss's gradient 50 times as large; in decoders whose values are large it would
    drown every other loss.

    Its default weight is 0.1, and not the paper's 1, which has no other loss beside it: at 1 its gradient was 3 times
    that of `forward_kl` in a small decoder, and set the student back, and at 0.1 as large as that of `hidden_mse`.

    When to use it: a student of another width and other heads, most of all an encoder: one layer of the teacher (the
    last, or one of the upper third) is enough.

    Args:
        student: Queries, keys or values of all heads, side by side.
        teacher: The same of the teacher.
        mask: True at tokens that are not padding.
        heads: A, a divisor of both widths; 0 for as many as leave 16 dimensions of the teacher to each, as in the
            paper. Fewer make the relations sharper.
        relative: In proportion to the size of each model's own vectors; False for relations without m_a.
        causal: A token is related to itself and those before it alone, as in a decoder.

    Returns:
        Nats for each token, >= 0; 0 at padding.

    Source: MiniLMv2, Wang et al. 2021, equation 5, https://arxiv.org/abs/2012.15828
    """
    heads = heads or paper_heads(student.shape[-1], teacher.shape[-1])
    log_q, log_p = (_relations(side, mask, heads, relative, causal) for side in (student, teacher.detach()))
    p = log_p.exp()
    values = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean(1)
    return values.masked_fill(~mask, 0.0)


def paper_heads(width: int, teacher_width: int) -> int:
    """The largest number of relation heads that divides both widths, with `HEAD_WIDTH` dimensions of the teacher."""
    most = max(1, teacher_width // HEAD_WIDTH)
    return max(count for count in range(1, most + 1) if width % count == teacher_width % count == 0)


def _relations(states: Tensor, mask: Tensor, heads: int, relative: bool, causal: bool) -> Tensor:
    width = states.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(f"`heads` has to divide both widths, got {heads} relation heads and width {width}.")
    split = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    if relative:
        squares = split.square().mean(-1).masked_fill(~mask[:, None, :], 0.0).sum(-1)
        size = squares / mask.sum(-1, keepdim=True).clamp(min=1)
        split = split / size.clamp(min=torch.finfo(size.dtype).tiny).sqrt()[:, :, None, None]
    scores = split @ split.transpose(2, 3) / (width // heads) ** 0.5
    length = states.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=states.device)  # padding looks at itself, and counts nothing
    seen = mask[:, None, :] | own
    if causal:
        seen = seen & torch.ones_like(own).tril()
    # A finite number: -inf would give the NaN of 0 * inf in the gradient.
    return scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).log_softmax(-1)
