"""Model Stock: interpolate between the base and the mean of fine-tunes, depending on the angle between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import weighted_sum
from hf_transfer_ext.merging.arithmetic.geometry import cosines_of, gram_of_models
from hf_transfer_ext.merging.method import merge_method


@merge_method(unit="row", count=(2, None), statistics=gram_of_models)
def model_stock(
    base: Float[Tensor, "rows columns"],
    models: Sequence[Float[Tensor, "rows columns"]],
    *,
    filter_wise: bool = False,
    gram: Float64[Tensor, "models models"],
) -> Float[Tensor, "rows columns"]:
    r"""A point between the base and the mean of the fine-tunes, closer to the mean the more the fine-tunes agree.

    .. math::
        \theta = r \bar\theta + (1 - r) \theta_0, \quad r = \frac{k \cos \varphi}{1 + (k - 1) \cos \varphi}

    for k models, where cos phi is the mean cosine between two changes.

    When to use it: for two or more fine-tunes on the same data with other seeds or settings, without tuning any
    weight.

    Args:
        filter_wise: Use one angle per row instead of one per tensor.
        gram: Scalar products of the changes.

    Returns:
        The merged weights.

    Deviations: the paper derives r for two models and for equal angles; for more models with different angles, the
    mean cosine is used, as in mergekit.

    Source: Model Stock, Jang et al. 2024, https://arxiv.org/abs/2403.19522
    """
    count = len(models)
    mean = weighted_sum(models, [1 / count] * count)
    products = gram
    if filter_wise:
        rows = torch.stack([model - base for model in models], dim=1).double()  # (rows, models, columns)
        products = rows @ rows.transpose(1, 2)
    pairs = torch.triu(torch.ones(count, count, dtype=torch.bool), diagonal=1)
    cosine = cosines_of(products)[..., pairs].mean(-1, keepdim=True)
    share = (count * cosine / (1 + (count - 1) * cosine)).to(base)
    return mean * share + base * (1 - share)
