from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.needs import HiddenRows, Tokens, averaged_over, require_finite


@averaged_over("tokens")
def rmu(hidden: HiddenRows, control: Float[Tensor, " hidden"], *, scale: float = 2.0) -> Tokens:
    r"""Pull a layer's hidden states on the forget set to one random direction.

    .. math:: \frac{1}{d} \lVert h - c\, u \rVert^2

    `u` is drawn once from [0, 1)^d and divided by its norm. Use it with `retain_hidden`, which keeps the
    hidden states of the retain set where they were.

    Args:
        scale: The constant c; 2 in the TOFU recipes, 6.5 to 300 for other models and layers.

    Returns:
        Mean square over the hidden size, for each token, >= 0.

    Source: Li et al., "The WMDP benchmark: measuring and reducing malicious use with unlearning", 2024, section 4,
    https://arxiv.org/abs/2403.03218
    """
    require_finite("scale", scale)
    return ((hidden - scale * control) ** 2).mean(-1)
