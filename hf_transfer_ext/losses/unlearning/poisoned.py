from __future__ import annotations

from hf_transfer_ext.losses.needs import Sequences, averaged_over


@averaged_over("sequences")
def poisoned(alternative_nll: Sequences, alternative_lengths: Sequences, picked: Sequences) -> Sequences:
    r"""Fine-tuning on wrong answers, for the answers that the method picked.

    .. math:: w\, \ell_\theta^{w} / n^{w}

    w is n / k for each of k picked answers out of n, and 0 for the others, so that the mean over the whole set is that
    over the picked ones.

    Returns:
        Weighted nats per token, one value per sequence, >= 0.

    Source: "Class machine unlearning for complex data via concepts inference and data poisoning", 2024,
    https://arxiv.org/abs/2405.15662
    """
    return picked * alternative_nll / alternative_lengths
