from __future__ import annotations

from hf_transfer_ext.losses.needs import Sequences, averaged_over


@averaged_over("sequences")
def idk(alternative_nll: Sequences, alternative_lengths: Sequences) -> Sequences:
    r"""Plain fine-tuning on the alternative answer, a refusal ("I don't know") for example.

    .. math:: \ell_\theta^{w} / n^{w}

    The mean is over the tokens of each answer, then over answers, so that a short refusal counts as a long one. With
    random labels as alternatives it is relabelling. It teaches a model to refuse, which need not mean that it forgot:
    audit it.

    Returns:
        Nats per token, one value per sequence, >= 0.

    Source: Maini et al., "TOFU", 2024, section 3.2 (IDK), https://arxiv.org/abs/2401.06121
    """
    return alternative_nll / alternative_lengths
