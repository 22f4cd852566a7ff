from __future__ import annotations

import torch

from hf_transfer_ext.losses.needs import Sequences, Tokens, answer_sums, averaged_over


@averaged_over("sequences")
def dmm(log_probs: Tokens, lengths: Sequences, target_outputs: Sequences) -> Sequences:
    r"""Match the outputs that a model trained without the forget set is predicted to give (datamodel matching).

    .. math:: \big(f_\theta(x) - \hat f(x)\big)^2, \qquad
        f_\theta(x) = \frac{1}{n} \sum_t \ln \frac{p(y_t)}{1 - p(y_t)}

    The output f of an answer is the mean margin of its tokens: the logit of the right token above the logarithm of
    the summed exponentials of all others. The method `dmm` computes the targets.
    `retain_dmm` is the same for the retain set.

    Returns:
        Squared nats per answer, >= 0.

    Source: Georgiev et al., "Attribute-to-delete: machine unlearning via datamodel matching", 2025, algorithm 1,
    https://arxiv.org/abs/2410.23232
    """
    return (mean_margins(log_probs, lengths) - target_outputs) ** 2


def mean_margins(log_probs: Tokens, lengths: Sequences) -> Sequences:
    """Mean over each answer's tokens of ln p - ln(1 - p), in nats; p is kept from 1 by the rounding of float32."""
    # ln(1 - p) = ln(-expm1(ln p)), exact also where p is near 1.
    certain = log_probs.clamp(max=-1e-7)
    margins = certain - torch.log(-torch.expm1(certain))
    return answer_sums(margins, lengths) / lengths
