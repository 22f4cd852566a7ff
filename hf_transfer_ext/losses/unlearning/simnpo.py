from __future__ import annotations

from torch.nn.functional import logsigmoid

from hf_transfer_ext.losses.needs import Sequences, averaged_over, require_at_least, require_finite


@averaged_over("sequences")
def simnpo(nll: Sequences, lengths: Sequences, *, beta: float = 4.5, delta: float = 0.0) -> Sequences:
    r"""NPO without a reference: only the answer's mean loss counts, so long and short answers weigh the same.

    .. math:: -\frac{2}{\beta} \ln \sigma\Big(\beta \big(\tfrac{\ell_\theta}{n} - \delta\big)\Big)

    Args:
        beta: Inverse temperature, > 0.
        delta: Mean loss, in nats per token, that counts as forgotten. The paper's margin is gamma = beta * delta.

    Returns:
        Nats per sequence, > 0.

    Source: Fan et al., "Simplicity prevails: rethinking negative preference optimization for LLM unlearning", 2024,
    https://arxiv.org/abs/2410.07163
    """
    require_at_least("beta", beta, 0, strictly=True)
    require_finite("delta", delta)
    return -(2.0 / beta) * logsigmoid(beta * (nll / lengths - delta))
