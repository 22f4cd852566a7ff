from __future__ import annotations

import torch

from hf_transfer_ext.losses.needs import (
    HiddenRows,
    Sequences,
    Tokens,
    answer_of_tokens,
    answer_sums,
    averaged_over,
    require_at_least,
)


@averaged_over("sequences")
def laf(
    hidden: HiddenRows, rebuilt: HiddenRows, reference_hidden: HiddenRows, lengths: Sequences, *,
    temperature: float = 5.0, contrast: float = 1.0,
) -> Sequences:  # fmt: skip
    r"""Move hidden states of the forget set to where its own autoencoder cannot rebuild them, and away from the start.

    .. math:: -\frac{1}{n} \sum_t e^{m_t / (m_t + 1)}
        - w \ln \frac{1}{n} \sum_t e^{c_t / \tau}, \qquad
        m_t = \frac{\lVert h_t - \hat h_t \rVert^2}{\lVert h^{ref}_t \rVert^2}, \quad c_t = 1 - \cos(h_t, h^{ref}_t)

    The first term is bounded, from -e to -1. No token is a label: answers only say where to look.

    Args:
        temperature: tau of the contrast, > 0.
        contrast: Weight w of the contrast, >= 0.

    Deviations: the contrast's sum over the forget set is taken within each answer, so that a step does not depend on
    how its batch is split; squared errors are relative to the hidden state's own square, which fits any model.

    Returns:
        Values per answer, of either sign.

    Source: Shen et al., "Label-agnostic forgetting: a supervision-free unlearning in deep models", 2024, sections 3.2
    and 3.3, https://arxiv.org/abs/2404.00506
    """
    require_at_least("temperature", temperature, 0, strictly=True)
    require_at_least("contrast", contrast, 0)
    answer = answer_of_tokens(lengths)
    away = turned(hidden, reference_hidden) / temperature
    # The logarithm of a mean of exponentials, by the largest exponent of each answer; away is from 0 to 2 / tau.
    largest = away.new_zeros(len(lengths)).scatter_reduce(0, answer, away.detach(), "amax")
    summed = answer_sums((away - largest[answer]).exp(), lengths)
    mismatched = answer_sums(mismatch(hidden, rebuilt, reference_hidden), lengths) / lengths
    return -mismatched - contrast * (largest + summed.log() - lengths.log())


def mismatch(hidden: HiddenRows, rebuilt: HiddenRows, reference_hidden: HiddenRows) -> Tokens:
    """e^(m / (m + 1)), where m is the squared error of rebuilding, relative to the reference's square: from 1 to e."""
    size = reference_hidden.detach().square().sum(-1).clamp(min=1e-12)
    error = (hidden - rebuilt).square().sum(-1) / size
    return (error / (error + 1)).exp()


def turned(hidden: HiddenRows, reference_hidden: HiddenRows) -> Tokens:
    """1 - cosine of the hidden state and the reference's, from 0 to 2."""
    return 1 - torch.nn.functional.cosine_similarity(hidden, reference_hidden, dim=-1)
