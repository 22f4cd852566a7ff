from __future__ import annotations

from hf_transfer_ext.losses.needs import HiddenRows, Tokens, averaged_over


@averaged_over("tokens")
def retain_hidden(hidden: HiddenRows, reference_hidden: HiddenRows) -> Tokens:
    r"""Hold a layer's hidden states on the retain set where the reference has them.

    .. math:: \frac{1}{d} \lVert h - h^{ref} \rVert^2

    Returns:
        Mean square over the hidden size, for each token, >= 0.

    Source: Li et al., "The WMDP benchmark", 2024, section 4, https://arxiv.org/abs/2403.03218
    """
    return ((hidden - reference_hidden) ** 2).mean(-1)
