"""Slerp: walk from one model to another along the sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import weighted_sum
from hf_transfer_ext.merging.arithmetic.geometry import Gram, gram_with_base
from hf_transfer_ext.merging.method import merge_method


@merge_method(count=(1, 1), statistics=gram_with_base, stored=True)
def slerp(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    t: float,
    gram: Gram,
) -> Float[Tensor, "*shape"]:
    r"""Spherical interpolation between the base and one other model, each tensor taken as one vector.

    .. math::
        \theta = \frac{\sin((1 - t) \Omega)}{\sin \Omega} \theta_0 + \frac{\sin(t \Omega)}{\sin \Omega} \theta_1, \quad
        \cos \Omega = \frac{\langle \theta_0, \theta_1 \rangle}{\|\theta_0\| \|\theta_1\|}

    Args:
        t: 0 gives the base, 1 the other model.
        gram: Scalar products of the base and the model.

    Returns:
        The merged weights. Nearly parallel vectors (|cos| > 0.9995, as mergekit) are interpolated on a line.

    Source: Animating rotation with quaternion curves, Shoemake 1985, https://doi.org/10.1145/325165.325242
    """
    norms = gram.diagonal().sqrt()
    cosine = float(gram[0, 1] / (norms[0] * norms[1]).clamp(min=1e-16))
    if abs(cosine) > 0.9995:
        return weighted_sum([base, models[0]], [1 - t, t])
    angle = math.acos(cosine)
    return weighted_sum(
        [base, models[0]], [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    )
