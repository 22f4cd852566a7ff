"""RAM+ per tensor: like RAM, with larger changes for elements that only one model changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from hf_transfer_ext.merging.arithmetic.changes import changes_of, sum_of
from hf_transfer_ext.merging.method import Pieces, gives, merge_method


@gives("scales")
def unique_scales(
    pieces: Pieces, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5, **options: Any
) -> dict[str, Any]:
    """lambda_i = 1 + r min(alpha, shared_i / unique_i); a model without unique elements counts as one with epsilon."""
    shared = unique = torch.zeros((), dtype=torch.int64)
    for base, models in pieces:
        if base is None:
            raise ValueError("`ramplus_tl` needs a base model.")
        touched = torch.stack([change.abs().reshape(-1) > epsilon for change in changes_of(base, models)])
        count = touched.sum(0)
        shared = shared + (touched & (count > 1)).sum(1).cpu()
        unique = unique + (touched & (count == 1)).sum(1).cpu()
    rho = shared.double() / unique.double().clamp(min=epsilon)
    return {"scales": (1 + r * rho.clamp(0, alpha)).tolist()}


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
    r"""Like `ram`, but changes that only model i made are multiplied by a factor that grows with its overlap.

    .. math::
        \lambda_i = 1 + r \min(\alpha, \rho_i), \quad
        \rho_i = \frac{\text{elements changed by } i \text{ and others}}{\text{elements changed by } i \text{ only}}

    When to use it: as `ram`, where the mean over shared elements weakens each of the models.

    Args:
        r: Strength of the factor.
        alpha: Upper limit for the overlap.
        epsilon: Changes of at most this magnitude count as none, in units of the weights.
        scales: lambda_i, computed for each tensor.

    Returns:
        The merged weights.

    Source: Reinforced Agent Merging (RAM), Yuan et al. 2026, https://arxiv.org/abs/2601.13572
    """
    changes = [model - base for model in models]
    sparse = [hardshrink(change, epsilon) for change in changes]  # 0 where |t_i| <= epsilon
    count = sum_of(one.sign().abs() for one in sparse)
    alone = (2 - count).clamp(0, 1)  # 1 where one model changed (or none, where all of `kept` is 0), else 0
    stronger = sum_of((scale - 1) * one * alone for scale, one in zip(scales, sparse, strict=True))
    return base + (sum_of(sparse) / count.clamp(min=1) + stronger)
