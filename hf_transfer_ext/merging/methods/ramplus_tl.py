"""RAM+, tensor by tensor: as RAM, with what only one model changed made stronger."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import changes_of
from hf_transfer_ext.merging.arithmetic.overlap import merge_overlap, unique_scales
from hf_transfer_ext.merging.method import merge_method


@merge_method(statistics=unique_scales)
def ramplus_tl(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    scales: Sequence[float],
) -> Float[Tensor, "*shape"]:
    r"""As `ram`, but a change that only model i made is multiplied by a factor that grows with its overlap.

    .. math::
        \lambda_i = 1 + r \min(\alpha, \rho_i), \quad
        \rho_i = \frac{\text{elements changed by } i \text{ and others}}{\text{elements changed by } i \text{ only}}

    Args:
        r: Strength of the factor.
        alpha: Largest overlap that counts.
        epsilon: Largest change that counts as none, in units of the weights.
        scales: lambda_i, counted in each tensor.

    Returns:
        The merged weights.

    Source: Reinforced Agent Merging (RAM), Yuan et al. 2026, https://arxiv.org/abs/2601.13572
    """
    return base + merge_overlap(changes_of(base, models), epsilon, scales)
