"""Iso-CTS: Iso-C, with the least common directions replaced by task-specific ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.spectral import add_mean, nearest_orthogonal, sum_of_changes, svd
from hf_transfer_ext.merging.method import merge_method
from hf_transfer_ext.merging.types import Coefficient


@merge_method(unit="matrix")
def iso_cts(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    common_space_fraction: float = 0.8,
    lambda_: Coefficient = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Keep the leading directions of the summed change, and add the leading directions of each model outside of them.

    .. math::
        \sum_i t_i = U S V^T, \quad t_i - U^{:k} U^{:k\,T} t_i = U_i S_i V_i^T, \quad
        \theta = \theta_0 + \lambda \, \bar\sigma \, \bar U \bar V^T

    where U-bar and V-bar are the nearest matrices with orthonormal columns to [U_1^{:s} ... U_n^{:s} U^{:k}] and
    [V_1^{:s} ... V_n^{:s} V^{:k}], and sigma-bar is the mean of all kept singular values. The part of the rank beyond
    `common_space_fraction` is divided evenly among the models: n s + k is the rank.

    When to use it: as `iso_c`, for many or very different tasks, whose own directions the sum would lose.

    Args:
        common_space_fraction: Share of the rank for common directions, from 0 to 1.
        lambda_: Scale of the combined change (`lambda` in YAML).

    Returns:
        The merged weights. Tensors that are not matrices get the mean change.

    Source: Isotropic model merging, Marczak et al. 2025, https://arxiv.org/abs/2502.04959
    """
    if base.dim() != 2:
        return add_mean(base, models, lambda_)
    rank = min(base.shape)
    own = round((rank - int(rank * common_space_fraction)) / len(models))
    common = max(0, rank - own * len(models))
    lefts, values, rights = [], [], []
    shared, strengths, directions = svd(sum_of_changes(base, models), common)
    for model in models if own else ():
        change = model - base
        left, value, right = svd(change - shared @ (shared.T @ change), own)
        lefts.append(left)
        values.append(value)
        rights.append(right)
    left = nearest_orthogonal(torch.cat([*lefts, shared], dim=1))
    right = nearest_orthogonal(torch.cat([*rights, directions], dim=0))
    return torch.addmm(base, left, lambda_ * torch.cat([*values, strengths]).mean() * right)
