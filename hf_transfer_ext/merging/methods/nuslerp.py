"""NuSlerp: weighted slerp, for whole tensors, rows or columns, relative to a base if there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.geometry import cosine_sums, slerp_factors
from hf_transfer_ext.merging.method import Promises, for_each, merge_method
from hf_transfer_ext.merging.types import PerModelCoefficient


@merge_method(unit="row", base="optional", count=(2, 2), statistics=cosine_sums, promises=Promises(equal={}))
def nuslerp(
    base: Float[Tensor, "rows columns"] | None,
    models: Sequence[Float[Tensor, "rows columns"]],
    *,
    weight: PerModelCoefficient,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    products: Float64[Tensor, "*products"],
) -> Float[Tensor, "rows columns"]:
    r"""Spherical interpolation between two models, or between their changes from a base, at t = w_2 / (w_1 + w_2).

    .. math:: x = \frac{\sin((1 - t) \Omega)}{\sin \Omega} x_1 + \frac{\sin(t \Omega)}{\sin \Omega} x_2

    When to use it: as `slerp`, with weights in place of `t`, or for the changes from a base.

    Args:
        weight: w_1 and w_2; if they sum to 0, t is 0.5.
        nuslerp_flatten: Treat a tensor as one vector. Otherwise, each row (the last dimension) is a vector,
        nuslerp_row_wise: or, with this option, each column; the name is mergekit's.
        products: <x_1, x_1>, <x_1, x_2> and <x_2, x_2>, for the tensor or for each column.

    Returns:
        The merged weights. Parallel vectors (|sin| < 1e-8) are interpolated linearly.

    Source: mergekit, Goddard et al. 2024, https://arxiv.org/abs/2403.13257
    """
    first, second = models if base is None else (models[0] - base, models[1] - base)
    one, two = for_each(weight, models)
    t = 0.5 if abs(one + two) < 1e-6 else two / (one + two)
    if not nuslerp_flatten and not nuslerp_row_wise:
        pairs = ((first, first), (first, second), (second, second))
        products = torch.stack([(a.double() * b.double()).sum(-1, keepdim=True) for a, b in pairs])
    start, end = (factors.to(first) for factors in slerp_factors(products[0], products[1], products[2], t))
    merged = first * start + second * end
    return merged if base is None else merged + base
