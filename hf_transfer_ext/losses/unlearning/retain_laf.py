from __future__ import annotations

from hf_transfer_ext.losses.needs import HiddenRows, Tokens, averaged_over, require_at_least
from hf_transfer_ext.losses.unlearning.laf import mismatch, turned


@averaged_over("tokens")
def retain_laf(
    hidden: HiddenRows, rebuilt: HiddenRows, reference_hidden: HiddenRows, *, contrast: float = 1.0
) -> Tokens:
    r"""Hold hidden states of the retain set where its autoencoder rebuilds them, and aligned with the reference.

    .. math:: e^{m_t / (m_t + 1)} + w\, (1 - \cos(h_t, h^{ref}_t))

    Args:
        contrast: Weight w of the alignment, >= 0.

    Returns:
        Values per token, from 1 to e + 2 w.

    Source: Shen et al., "Label-agnostic forgetting", 2024, sections 3.2 and 3.3, https://arxiv.org/abs/2404.00506
    """
    require_at_least("contrast", contrast, 0)
    return mismatch(hidden, rebuilt, reference_hidden) + contrast * turned(hidden, reference_hidden)
