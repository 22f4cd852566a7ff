from __future__ import annotations

from torch.nn.functional import logsigmoid

from hf_transfer_ext.losses.needs import Sequences, averaged_over, require_at_least


@averaged_over("sequences")
def dpo(
    nll: Sequences,
    reference_nll: Sequences,
    alternative_nll: Sequences,
    reference_alternative_nll: Sequences,
    *,
    beta: float = 0.1,
) -> Sequences:
    r"""Preference of another answer (a refusal, or one that the model made up) over the one to forget.

    .. math:: -\frac{2}{\beta} \ln \sigma\big(\beta
        [(\ell_{ref}^{w} - \ell_\theta^{w}) - (\ell_{ref}^{l} - \ell_\theta^{l})]\big)

    `w` is the alternative, `l` the answer to forget. With refusals it is IdkDPO, with alternatives sampled from
    the model AltPO. The factor 2 / beta, instead of DPO's 1, puts it on the scale of `npo`.

    Args:
        beta: Inverse temperature, > 0.

    Returns:
        Nats per sequence, > 0; (2 / beta) ln 2 where model and reference agree.

    Source: Rafailov et al., "Direct preference optimization", 2023, https://arxiv.org/abs/2305.18290; for forgetting:
    Maini et al. 2024, https://arxiv.org/abs/2401.06121, and Mekala et al. 2024, https://arxiv.org/abs/2409.13474
    """
    require_at_least("beta", beta, 0, strictly=True)
    wanted = reference_alternative_nll - alternative_nll
    unwanted = reference_nll - nll
    return -(2.0 / beta) * logsigmoid(beta * (wanted - unwanted))
