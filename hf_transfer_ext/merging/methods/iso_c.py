"""Iso-C: the sum of the changes, with all singular values set to their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.spectral import add_mean, inner_product, nearest_orthogonal, sum_of_changes
from hf_transfer_ext.merging.method import merge_method
from hf_transfer_ext.merging.types import Coefficient


@merge_method(unit="matrix")
def iso_c(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    lambda_: Coefficient = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Give all singular directions of the summed change the same strength, so that no model dominates.

    .. math::
        \sum_i t_i = U S V^T, \quad \theta = \theta_0 + \lambda \, \bar\sigma \, U V^T, \quad
        \bar\sigma = \mathrm{mean}(S)

    When to use it: for fine-tunes of related tasks, where a few strong directions of one would hide the others.

    Args:
        lambda_: Scale of the combined change (`lambda` in YAML); 1 to 2 is typical.

    Returns:
        The merged weights. Tensors that are not matrices get the mean change.

    Source: Isotropic model merging, Marczak et al. 2025, https://arxiv.org/abs/2502.04959
    """
    if base.dim() != 2:
        return add_mean(base, models, lambda_)
    total = sum_of_changes(base, models)
    orthogonal = nearest_orthogonal(total)
    strength = inner_product(orthogonal, total) / min(base.shape)  # <U V^T, U S V^T> is the sum of S
    del total  # as large as a model's embedding, like each of the others
    return torch.addcmul(base, orthogonal, lambda_ * strength)
