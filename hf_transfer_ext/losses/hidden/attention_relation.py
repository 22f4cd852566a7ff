from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_transfer_ext.losses.layer_reading import reads


@reads("relations")
def attention_relation(
    student: Float[Tensor, "batch length width"],
    teacher: Float[Tensor, "batch length teacher_width"],
    mask: Bool[Tensor, "batch length"],
    *,
    heads: int = 1,
    causal: bool = False,
) -> Float[Tensor, "batch length"]:
    r"""KL between the self-relations of queries, of keys, or of values: no projection, whatever the widths.

    .. math:: \frac{1}{A} \sum_{a=1}^{A} KL(R^T_{at} \| R^S_{at}), \quad R_a = \mathrm{softmax}(X_a X_a^T / \sqrt{d_a})

    with X split into A relation heads of width d_a. MiniLM v2 adds this for Q, K and V of one layer of each model.

    When to use it: a student of another width and other heads, most of all an encoder: one layer of the teacher (the
    last, or one of the upper third) is enough.

    Args:
        student: Queries, keys or values of all heads, side by side.
        teacher: The same of the teacher.
        mask: True at tokens that are not padding.
        heads: A >= 1, a divisor of both widths.
        causal: A token is related to itself and those before it alone, as in a decoder.

    Returns:
        Nats for each token, >= 0; 0 at padding.

    Source: MiniLMv2, Wang et al. 2021, equation 5, https://arxiv.org/abs/2012.15828
    """
    log_q, log_p = _relations(student, mask, heads, causal), _relations(teacher.detach(), mask, heads, causal)
    p = log_p.exp()
    values = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean(1)
    return values.masked_fill(~mask, 0.0)


def _relations(states: Tensor, mask: Tensor, heads: int, causal: bool) -> Tensor:
    width = states.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(f"`heads` has to divide both widths, got {heads} relation heads and width {width}.")
    split = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.transpose(2, 3) / (width // heads) ** 0.5
    length = states.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=states.device)  # padding looks at itself, and counts nothing
    seen = mask[:, None, :] | own
    if causal:
        seen = seen & torch.ones_like(own).tril()
    # A finite number: -inf would give the NaN of 0 * inf in the gradient.
    return scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).log_softmax(-1)
