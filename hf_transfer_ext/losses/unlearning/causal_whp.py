from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.needs import TokenRows, Tokens, averaged_over


@averaged_over("tokens")
def causal_whp(
    logits: TokenRows,
    teacher_probs: Float[Tensor, "tokens shortlist"],
    teacher_ids: Int[Tensor, "tokens shortlist"],
) -> Tokens:
    r"""KL divergence from what the original says of somebody else, whose name stands in place of the target's.

    .. math:: \sum_{v \in S} \bar p_v (\ln \bar p_v - \ln p_v)
        + (1 - \bar p_S)\, (\ln (1 - \bar p_S) - \ln (1 - p_S))

    The teacher's distribution is known for its most likely tokens S; all others count as one. The method `causal_whp`
    computes it. Tokens without a teacher (probabilities all 0) give 0.

    Returns:
        Nats per token, >= 0, and 0 where the model agrees on S.

    Source: Liu et al., "Revisiting Who's Harry Potter: towards targeted unlearning from a causal intervention
    perspective", 2024, https://arxiv.org/abs/2407.16997
    """
    log_q = torch.log_softmax(logits, -1)
    on_list = log_q.gather(-1, teacher_ids)
    rest_log_q = log_q.scatter(-1, teacher_ids, -torch.inf).logsumexp(-1)
    rest = (1 - teacher_probs.sum(-1)).clamp(min=0)
    known = torch.special.xlogy(teacher_probs, teacher_probs) - teacher_probs * on_list
    beyond = torch.special.xlogy(rest, rest) - rest * rest_log_q
    return torch.where((teacher_probs > 0).any(-1), known.sum(-1) + beyond, 0.0 * log_q[:, 0])
