from __future__ import annotations

from torch.nn.functional import logsigmoid

from hf_transfer_ext.losses.needs import Sequences, averaged_over, require_at_least


@averaged_over("sequences")
def retain_ap(nll: Sequences, alternative_nll: Sequences, *, beta: float = 0.1) -> Sequences:
    r"""Answer preservation: an answer to retain stays more likely than a refusal of the same question.

    .. math:: -\frac{1}{\beta} \ln \sigma\big(\beta (\ell_\theta^{w} - \ell_\theta)\big)

    `w` is the alternative, a refusal. It needs no reference.

    Args:
        beta: Inverse temperature, > 0.

    Returns:
        Nats per sequence, > 0; (1 / beta) ln 2 where both are equally likely.

    Source: Yuan et al., "A closer look at machine unlearning for large language models", 2024, section 4 (AP),
    https://arxiv.org/abs/2410.08109
    """
    require_at_least("beta", beta, 0, strictly=True)
    return -(1.0 / beta) * logsigmoid(beta * (alternative_nll - nll))
