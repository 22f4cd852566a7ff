"""KnOTS: TIES in a basis shared by all changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import check_weights, elect_sign, one_for_zero, sum_of
from hf_transfer_ext.merging.arithmetic.selection import keep_magnitudes
from hf_transfer_ext.merging.arithmetic.spectral import add_mean, shared_basis
from hf_transfer_ext.merging.arithmetic.trimming import kept_magnitudes
from hf_transfer_ext.merging.method import PerModel, Promises, Whole, for_each, merge_method
from hf_transfer_ext.merging.types import Coefficient, PerModelCoefficient


@merge_method(unit="matrix", check=check_weights, promises=Promises(alone={"weight": 1}))
def knots(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    weight: PerModelCoefficient,
    density: PerModel = 1.0,
    normalize: bool = True,
    lambda_: Coefficient = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Rotate the changes into a shared basis, in which those of LoRA adapters are comparable, and merge them there.

    .. math::
        [t_1 \dots t_n] = U S [V_1 \dots V_n]^T, \quad
        \theta = \theta_0 + U \, \mathrm{TIES}(S V_1^T, \dots, S V_n^T)

    When to use it: for LoRA adapters, whose changes hardly overlap in the original basis.

    Args:
        weight: w_i, for the sign election and the sum.
        density: Share of the elements of S V_i^T to keep, by magnitude.
        normalize: Divide by the sum of the weights of the agreeing changes.
        lambda_: Scale of the combined change (`lambda` in YAML).

    Returns:
        The merged weights. Tensors that are not matrices get the mean change.

    Source: KnOTS, Stoica et al. 2025, https://arxiv.org/abs/2410.19735
    """
    if base.dim() != 2:
        return add_mean(base, models, lambda_)
    changes = torch.stack(list(models), dim=1).sub_(base[:, None]).flatten(1)  # side by side, without a copy of them
    together, back = shared_basis(changes)
    aligned = [part.contiguous() for part in together.split(base.shape[1], dim=1)]
    bounds = kept_magnitudes(Whole(None, aligned), density, 0.0)
    sparse = [keep_magnitudes(part, *pair) for part, pair in zip(aligned, bounds, strict=True)]
    weights = for_each(weight, models)
    votes = [w * change for w, change in zip(weights, sparse, strict=True)]
    sign = elect_sign(votes)
    agreeing = [(vote * sign).relu() for vote in votes]  # magnitudes of the votes with the elected sign, 0 elsewhere
    merged = sign * sum_of(agreeing)
    if normalize:
        merged = merged / one_for_zero(sum_of(w * one.sign() for w, one in zip(weights, agreeing, strict=True)))
    return base + back(lambda_ * merged)
