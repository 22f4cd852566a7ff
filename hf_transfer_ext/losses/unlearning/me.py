from __future__ import annotations

import math

import torch

from hf_transfer_ext.losses.needs import TokenRows, Tokens, averaged_over


@averaged_over("tokens")
def me(logits: TokenRows) -> Tokens:
    r"""Maximize entropy: KL from the uniform distribution to the model's, whatever the answer is.

    .. math:: \mathrm{KL}(U \,\|\, p) = -\ln V - \frac{1}{V} \sum_v \ln p_v

    Returns:
        Nats per token, >= 0, and 0 where all tokens are equally likely.

    Source: Yuan et al., "A closer look at machine unlearning for large language models", 2024 (ME+GD),
    https://arxiv.org/abs/2410.08109
    """
    return -math.log(logits.shape[-1]) - torch.log_softmax(logits, -1).mean(-1)
