from __future__ import annotations

from torch.nn.functional import logsigmoid

from hf_transfer_ext.losses.needs import Sequences, averaged_over, require_at_least


@averaged_over("sequences")
def npo(nll: Sequences, reference_nll: Sequences, *, beta: float = 0.1) -> Sequences:
    r"""Negative preference optimization: gradient ascent that fades as the answer gets less likely than it was.

    .. math:: -\frac{2}{\beta} \ln \sigma\big(\beta (\ell_\theta - \ell_{ref})\big)

    Args:
        beta: Inverse temperature, > 0. Towards 0 the gradient is that of gradient ascent on the sequence.

    Returns:
        Nats per sequence, > 0; (2 / beta) ln 2 where model and reference agree.

    Source: Zhang et al., "Negative preference optimization", 2024, https://arxiv.org/abs/2404.05868
    """
    require_at_least("beta", beta, 0, strictly=True)
    return -(2.0 / beta) * logsigmoid(beta * (nll - reference_nll))
