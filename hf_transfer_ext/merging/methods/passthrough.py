"""Passthrough: the unchanged tensors of one model; with slices, it stacks layers of several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.method import Promises, for_each, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import PerModelCoefficient


@merge_method(base="none", count=(1, 1), promises=Promises(alone={}))
def passthrough(
    base: Float[Tensor, "*shape"] | None,
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    scale: PerModelCoefficient = 1.0,
) -> Float[Tensor, "*shape"]:
    """theta = scale * theta_1, for stacks of layers ("frankenmerges") and for silencing layers (scale 0).

    When to use it: to build a deeper model from layers of others, or a copy in another dtype.

    Args:
        scale: Factor of the tensor; 1 copies the bytes.

    Returns:
        The scaled weights.

    Source: SOLAR 10.7B (depth up-scaling), Kim et al. 2023, https://arxiv.org/abs/2312.15166
    """
    return models[0] * for_each(scale, models)[0]
