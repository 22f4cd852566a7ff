from __future__ import annotations

from hf_transfer_ext.losses.needs import TokenRows, Tokens, averaged_over


@averaged_over("tokens")
def flat_logits(logits: TokenRows) -> Tokens:
    r"""Squared margin of the largest logit over the mean logit: flattens the distribution, whatever the answer is.

    .. math:: \big(\max_v z_v - \tfrac{1}{V} \sum_v z_v\big)^2

    Its optimum is that of `me`: all tokens equally likely.

    Returns:
        Squared logits per token, >= 0, and 0 where all logits are equal.

    Source: Entesari et al., "Constrained entropic unlearning: a primal-dual framework for large language models",
    2025, https://arxiv.org/abs/2506.05314
    """
    return (logits.max(-1).values - logits.mean(-1)) ** 2
