"""RegMean: the linear layer whose outputs are closest to those of all models, each on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import check_mean_weights, sum_of
from hf_transfer_ext.merging.method import Extra, Promises, for_each, merge_method
from hf_transfer_ext.merging.types import PerModelCoefficient


@merge_method(
    unit="matrix",
    base="none",
    extra={"gram": Extra(shape="columns", required=False)},
    check=check_mean_weights,
    promises=Promises(alone={"weight": 0.7}, equal={}),
)
def regmean(
    base: Float[Tensor, "*shape"] | None,
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient = 1.0,
    off_diagonal: float = 0.9,
    gram: Sequence[Float[Tensor, "columns columns"]] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Merge linear layers by least squares on the activations of each model.

    .. math::
        W = \arg\min_W \sum_i w_i \lVert X_i W^T - X_i W_i^T \rVert_F^2
          = \Big(\sum_i w_i W_i \tilde G_i\Big) \Big(\sum_i w_i \tilde G_i\Big)^{-1}, \quad G_i = X_i^T X_i

    where the rows of X_i are the inputs of the layer in model i; the tilde multiplies off-diagonal elements by alpha.

    When to use it: where inputs of each task are at hand and layers should behave on them as each model's own.

    Args:
        weight: w_i; the paper uses 1, with Gram matrices over equally many inputs.
        off_diagonal: alpha, from 0 to 1. 1 is the least-squares solution, which is singular if the inputs span too few
            dimensions; the paper uses 0.9, and 0.1 for T5.
        gram: G_i, one per model, columns x columns: in YAML, `tensors: {gram: path}` of each model, with the names of
            the weights. Tensors without one (embeddings) and vectors (biases, norms) get the weighted mean.

    Returns:
        The merged weights. Columns whose inputs are 0 in all models, which have no effect, get the weighted mean.

    Raises:
        ValueError: The weights sum to 0, or the weighted Gram matrix is singular.

    Source: Dataless knowledge fusion (RegMean), Jin et al. 2023, https://arxiv.org/abs/2212.09849
    """
    weights = for_each(weight, models)
    mean = sum_of(w * model for w, model in zip(weights, models, strict=True)) / sum(weights)
    if gram is None or mean.dim() < 2:
        return mean
    scaled = []
    for w, one in zip(weights, gram, strict=True):
        products = one.double()
        diagonal = torch.diag(products.diagonal())
        scaled.append(w * (off_diagonal * (products - diagonal) + diagonal))
    total = sum_of(scaled)
    # Solve for the difference from the mean, with 1 on the diagonal for columns whose inputs are all 0.
    unreached = torch.diag((total.diagonal() == 0).to(total))
    distances = sum_of((model - mean).double() @ one for model, one in zip(models, scaled, strict=True))
    solution, is_singular = torch.linalg.solve_ex(total + unreached, distances, left=False)
    if is_singular:
        raise ValueError("The Gram matrices are singular: inputs span too few dimensions. Lower `off_diagonal`.")
    return mean + solution.to(mean)
