"""TSV-M: the leading singular vectors of all changes, orthogonalized jointly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.spectral import add_mean, nearest_orthogonal, svd
from hf_transfer_ext.merging.method import Promises, merge_method
from hf_transfer_ext.merging.types import Coefficient


@merge_method(unit="matrix", promises=Promises(alone={}))
def tsv(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    lambda_: Coefficient = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Divide the rank of a matrix among the models, and remove the interference between their singular vectors.

    .. math::
        t_i = U_i S_i V_i^T, \quad U = [U_1^{:k} \dots U_n^{:k}], \quad V = [V_1^{:k} \dots V_n^{:k}], \quad
        k = \lfloor \mathrm{rank} / n \rfloor, \quad
        \theta = \theta_0 + \lambda \, \bar U \, \mathrm{diag}(S_1^{:k} \dots S_n^{:k}) \, \bar V^T

    where U-bar and V-bar are the matrices with orthonormal columns nearest to U and V.

    When to use it: for many fine-tunes of different tasks, full or of high rank, where time for singular value
    decompositions is at hand.

    Args:
        lambda_: Scale of the combined change (`lambda` in YAML); the paper's alpha.

    Returns:
        The merged weights. Tensors that are not matrices get the mean change.

    Source: Task Singular Vectors, Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081
    """
    if base.dim() != 2:
        return add_mean(base, models, lambda_)
    kept = max(1, min(base.shape) // len(models))
    lefts, values, rights = zip(*(svd(model - base, kept) for model in models), strict=True)
    left = nearest_orthogonal(torch.cat(lefts, dim=1))
    right = nearest_orthogonal(torch.cat(rights, dim=0))
    del lefts
    return torch.addmm(base, left, lambda_ * torch.cat(values)[:, None] * right)
