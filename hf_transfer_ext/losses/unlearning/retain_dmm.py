from __future__ import annotations

from hf_transfer_ext.losses.needs import Sequences, Tokens, averaged_over
from hf_transfer_ext.losses.unlearning.dmm import dmm


@averaged_over("sequences")
def retain_dmm(log_probs: Tokens, lengths: Sequences, target_outputs: Sequences) -> Sequences:
    r"""Match the predicted outputs on the retain set, too: the same as `dmm` on the forget set.

    .. math:: \big(f_\theta(x) - \hat f(x)\big)^2

    Returns:
        Squared nats per answer, >= 0.

    Source: Georgiev et al., "Attribute-to-delete: machine unlearning via datamodel matching", 2025, algorithm 1,
    https://arxiv.org/abs/2410.23232
    """
    return dmm(log_probs, lengths, target_outputs)
