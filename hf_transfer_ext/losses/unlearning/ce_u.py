from __future__ import annotations

import torch

from hf_transfer_ext.losses.needs import TokenIds, TokenRows, Tokens, averaged_over


@averaged_over("later tokens")
def ce_u(logits: TokenRows, targets: TokenIds) -> Tokens:
    r"""Cross-entropy towards the model's own distribution without the answer's token.

    .. math:: -\sum_{v \ne y} q_v \ln p_v, \quad q = \operatorname{softmax}(z : z_y = -\infty)

    The target follows the model and carries no gradient. The first token of each answer is left out by the average:
    it is often the start of any answer at all.

    Returns:
        Nats per token.

    Source: Yang, "CE-U: cross entropy unlearning", 2025, https://arxiv.org/abs/2503.01224
    """
    without = logits.detach().scatter(-1, targets[:, None], float("-inf"))
    return -(torch.softmax(without, -1) * torch.log_softmax(logits, -1)).sum(-1)
