"""KnOTS: TIES in the basis that all changes share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import add_elected_changes, changes_of, check_weights
from hf_transfer_ext.merging.arithmetic.selection import keep_magnitudes
from hf_transfer_ext.merging.arithmetic.spectral import add_mean, svd
from hf_transfer_ext.merging.arithmetic.trimming import kept_magnitudes
from hf_transfer_ext.merging.method import PerModel, Whole, merge_method


@merge_method(unit="matrix", check=check_weights)
def knots(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Rotate the changes into one basis, in which those of LoRA adapters become comparable, and merge them there.

    .. math::
        [t_1 \dots t_n] = U S [V_1 \dots V_n]^T, \quad
        \theta = \theta_0 + U \, \mathrm{TIES}(S V_1^T, \dots, S V_n^T)

    Args:
        weight: w_i of the election and the sum.
        density: Share of the elements of S V_i^T that is kept, by magnitude.
        normalize: Divide by the weights of those that agree.
        lambda_: Strength of the whole change (`lambda` in YAML).

    Returns:
        The merged weights. Tensors that are no matrices get the mean change.

    Source: KnOTS, Stoica et al. 2025, https://arxiv.org/abs/2410.19735
    """
    changes = changes_of(base, models)
    if base.dim() != 2:
        return add_mean(base, changes, lambda_)
    left, values, right = svd(torch.cat(changes, dim=1))
    aligned = [part.contiguous() for part in (values[:, None] * right).split(base.shape[1], dim=1)]
    bounds = kept_magnitudes(Whole(None, aligned), density, 0.0)
    kept = [keep_magnitudes(part, *pair) for part, pair in zip(aligned, bounds, strict=True)]
    merged = add_elected_changes(torch.zeros_like(kept[0]), kept, weight, normalize=normalize, lambda_=lambda_)
    return base + left @ merged
