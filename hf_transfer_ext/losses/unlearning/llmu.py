from __future__ import annotations

from hf_transfer_ext.losses.needs import Sequences, averaged_over, require_at_least


@averaged_over("sequences")
def llmu(
    nll: Sequences,
    lengths: Sequences,
    alternative_nll: Sequences,
    alternative_lengths: Sequences,
    *,
    ascent: float = 0.5,
) -> Sequences:
    r"""Gradient ascent on the answer, and cross-entropy on an answer that has nothing to do with the question.

    .. math:: -a\, \ell_\theta / n + \ell_\theta^{w} / n^{w}

    `w` is the answer to another question, drawn at random. Each answer's loss is the mean over its tokens.

    Args:
        ascent: Weight a of the ascent, >= 0; 0 is `idk` towards random answers.

    Returns:
        Nats per token, one value per sequence, of any sign and without a lower bound.

    Source: Yao et al., "Large language model unlearning", 2023, section 4, https://arxiv.org/abs/2310.10683
    """
    require_at_least("ascent", ascent, 0)
    return alternative_nll / alternative_lengths - ascent * nll / lengths
