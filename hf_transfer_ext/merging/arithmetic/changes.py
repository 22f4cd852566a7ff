"""Arithmetic that the methods on changes share: subtract the base, sum with weights, elect a sign."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.method import PerModelCoefficient, for_each, in_float

Weights = Float[Tensor, "*shape"]


def changes_of(base: Weights, models: Sequence[Weights]) -> list[Weights]:
    """t_i = theta_i - theta_0, in float32 at least."""
    base = in_float(base)
    return [in_float(model) - base for model in models]


def sum_of(tensors: Iterable[Weights]) -> Weights:
    """sum_i x_i, in the order of the tensors."""
    first, *others = tensors
    total = first
    for tensor in others:
        total = total + tensor
    return total


def weighted_sum(tensors: Sequence[Weights], weights: Sequence[Any] | Float[Tensor, " models"]) -> Weights:
    """sum_i w_i x_i; in one compiled pass where nothing wants a gradient.

    Args:
        weights: Numbers or tensors of one element; those in float64 are rounded to the dtype of the x_i.
    """
    factors = list(weights)
    if kernels.can_take(*tensors) and not any(isinstance(one, Tensor) and one.requires_grad for one in factors):
        return kernels.merge_changes(None, tensors, [float(one) for one in factors])
    return sum_of(in_float(tensor) * one for one, tensor in zip(factors, tensors, strict=True))


def elect_sign(votes: Sequence[Weights]) -> Weights:
    """The sign of sum_i v_i, element by element: +1, also where the sum is 0, or -1 (TIES, "elect")."""
    total = sum_of(votes).detach() + 0.0  # which makes 0 of -0
    return torch.ones_like(total).copysign(total)


def one_for_zero(divisor: Weights) -> Weights:
    """The divisor, with 1 in the place of 0."""
    return divisor + (divisor == 0)


def check_weights(*, weight: PerModelCoefficient, normalize: bool = False, **others: object) -> None:
    """Refuse weights that sum to 0 where the result is divided by that sum; all 0 leaves the base as it is."""
    if any(_numbers(weight)):
        check_mean_weights(weight=weight, normalize=normalize)


def check_multislerp(*, weight: PerModelCoefficient, normalize_weights: bool = True, **others: object) -> None:
    """As `check_mean_weights`, for the option's name in `multislerp`."""
    check_mean_weights(weight=weight, normalize=normalize_weights)


def check_mean_weights(*, weight: PerModelCoefficient, normalize: bool = True, **others: object) -> None:
    """As `check_weights`, for means of models, where weights that are all 0 have no meaning either."""
    weights = _numbers(weight)
    if normalize and abs(sum(weights)) < 1e-8:
        raise ValueError(f"`normalize` divides by the sum of the weights, but {weights} sum to 0. Change a weight.")


def _numbers(weight: PerModelCoefficient) -> list[float]:
    """The weights as numbers. One weight for all models counts once: their number is not known here."""
    count = 1 if isinstance(weight, (int, float)) or (isinstance(weight, Tensor) and not weight.dim()) else len(weight)
    return [float(one.detach() if isinstance(one, Tensor) else one) for one in for_each(weight, count)]
