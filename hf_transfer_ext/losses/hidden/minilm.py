from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_transfer_ext.losses.hidden.attention_relation import attention_relation
from hf_transfer_ext.losses.layer_reading import reads


@reads("attention", weight=0.1)
def minilm(
    student_scores: Float[Tensor, "batch heads length length"],
    teacher_scores: Float[Tensor, "batch teacher_heads length length"],
    student_values: Float[Tensor, "batch length width"],
    teacher_values: Float[Tensor, "batch length teacher_width"],
    mask: Bool[Tensor, "batch length"],
    *,
    relative: bool = True,
    causal: bool = False,
) -> Float[Tensor, "batch length"]:
    r"""KL between the attention distributions of both models, and between the relations of their values.

    .. math:: \frac{1}{A} \sum_{a=1}^{A} KL(P^T_{at} \| P^S_{at}) + KL(R^T_{at} \| R^S_{at}), \quad
              P_a = \mathrm{softmax} \Big( \frac{Q_a K_a^T}{\sqrt{d_a}} \Big), \quad
              R_a = \mathrm{softmax} \Big( \frac{V_a V_a^T}{m_a \sqrt{d_a}} \Big)

    with m_a the mean square of the numbers in V_a over the text.

    When to use it: a student with as many attention heads as its teacher, of any width, from scratch or cut out of it;
    `layer_map: [[-1, -1]]` compares the last layers alone, as the paper does. `attention_relation` (MiniLMv2) is for
    other numbers of heads. It takes the place of other losses in the paper; beside a divergence, leave its weight at
    the default of 0.1, where its gradient was as large as that of `hidden_mse` in a small decoder: at 1 it was 3 times
    that of `forward_kl`, and set the student back.

    Deviations: the default weight; the paper has no m_a, without which the size of the values, which says nothing
    about a model, decides how large the loss and its gradient are (`attention_relation`); in a decoder a token attends
    to, and is related to, itself and those before it alone, a sliding window included; where heads share their values
    (grouped-query attention), each head has a copy of them.

    Args:
        student_scores: Before their softmax, -inf (or the smallest number of the dtype) where nothing is looked at.
        teacher_scores: The same of the teacher.
        student_values: Values of all heads, side by side.
        teacher_values: The same of the teacher.
        mask: True at tokens that are not padding.
        relative: In proportion to the size of each model's own values; False for relations without m_a.
        causal: As in a decoder.

    Returns:
        Nats for each token, >= 0; 0 at padding.

    Raises:
        ValueError: The numbers of attention heads differ.

    Source: MiniLM, Wang et al. 2020, equations 5 to 8, https://arxiv.org/abs/2002.10957
    """
    heads = student_scores.shape[1]
    if heads != teacher_scores.shape[1]:
        raise ValueError(
            f"minilm compares attention head by head, but the student has {heads} heads and the teacher "
            f"{teacher_scores.shape[1]}. Use `attention_relation`, which has heads of its own."
        )
    seen = mask[:, None, :] | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)  # padding sees itself
    if causal:
        seen = seen & torch.ones_like(seen).tril()
    log_q, log_p = (
        side.float().masked_fill(~seen[:, None], torch.finfo(torch.float32).min).log_softmax(-1)
        for side in (student_scores, teacher_scores.detach())
    )
    p = log_p.exp()
    attended = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean(1).masked_fill(~mask, 0.0)
    return attended + attention_relation(
        student_values, teacher_values, mask, heads=heads, relative=relative, causal=causal
    )
