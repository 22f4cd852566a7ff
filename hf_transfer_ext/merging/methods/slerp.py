"""Slerp: spherical interpolation between two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_transfer_ext.merging.arithmetic.fast import slerp_by_kernels
from hf_transfer_ext.merging.arithmetic.geometry import gram_with_base, slerp_factors
from hf_transfer_ext.merging.method import Promises, merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import Coefficient, Gram


@merge_method(count=(1, 1), statistics=gram_with_base, fast=slerp_by_kernels, promises=Promises(alone={"t": 1.0}))
def slerp(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    t: Coefficient,
    gram: Gram,
) -> Float[Tensor, "*shape"]:
    r"""Spherical interpolation between the base and one other model, with each tensor treated as one vector.

    .. math::
        \theta = \frac{\sin((1 - t) \Omega)}{\sin \Omega} \theta_0 + \frac{\sin(t \Omega)}{\sin \Omega} \theta_1, \quad
        \cos \Omega = \frac{\langle \theta_0, \theta_1 \rangle}{\|\theta_0\| \|\theta_1\|}

    When to use it: for two models of one family, where a mean would shrink the weights because the two point in
    different directions.

    Args:
        t: 0 gives the base, 1 the other model.
        gram: Scalar products of the base and the model.

    Returns:
        The merged weights. Nearly parallel vectors (|cos| > 0.9995, as in mergekit) are interpolated linearly.

    Source: Animating rotation with quaternion curves, Shoemake 1985, https://doi.org/10.1145/325165.325242
    """
    start, end = slerp_factors(gram[0, 0], gram[0, 1], gram[1, 1], t, parallel=0.9995)
    return start * base + end * models[0]
