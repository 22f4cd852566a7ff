"""Arithmetic that the methods on changes share: subtract the base, sum with weights, elect a sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.method import PerModel, for_each

Weights = Float[Tensor, "*shape"]


def changes_of(base: Weights, models: Sequence[Weights]) -> list[Weights]:
    """t_i = theta_i - theta_0, in float32 at least."""
    base = in_float(base)
    return [in_float(model) - base for model in models]


def in_float(tensor: Weights) -> Weights:
    """As float32 where it has fewer bits; itself otherwise."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def sum_of(tensors: Sequence[Weights]) -> Weights:
    """sum_i x_i, in memory of its own."""
    if len(tensors) == 1:
        return tensors[0].clone()
    total = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        total += tensor
    return total


def weighted_sum(tensors: Sequence[Weights], weight: PerModel) -> Weights:
    """sum_i w_i x_i."""
    weights = for_each(weight, tensors)
    if kernels.can_take(*tensors):
        return kernels.merge_changes(None, tensors, weights)
    total = in_float(tensors[0]) * weights[0]
    for one, tensor in zip(weights[1:], tensors[1:], strict=True):
        total.add_(tensor, alpha=one)
    return total


def add_changes(
    base: Weights, changes: Sequence[Weights], weight: PerModel, *, normalize: bool, lambda_: float
) -> Weights:
    """theta_0 + lambda * sum_i w_i t_i, divided by sum_i w_i with `normalize`."""
    scale = strength_of(for_each(weight, changes), normalize, lambda_)
    if kernels.can_take(base, *changes):
        return kernels.merge_changes(base, changes, for_each(weight, changes), lambda_=scale)
    return weighted_sum(changes, weight).mul_(scale).add_(base)


def strength_of(weights: Sequence[float], normalize: bool, lambda_: float) -> float:
    """lambda, divided by the sum of the weights with `normalize`."""
    if not normalize:
        return lambda_
    total = sum(weights)
    return lambda_ / total if total else 0.0  # all weights 0: check_weights has refused any other sum of 0


def add_elected_changes(
    base: Weights,
    changes: Sequence[Weights],
    weight: PerModel,
    *,
    votes: Sequence[float] | None = None,
    normalize: bool,
    lambda_: float,
) -> Weights:
    """Add only those changes that agree with the sign of a weighted sum (TIES, "elect" and "merge").

    With s the sign of sum_i v_i t_i (+1 where the sum is 0): lambda * sum of the w_i t_i for which v_i t_i has sign s,
    divided by the sum of their w_i with `normalize`. The changes are overwritten.

    Args:
        votes: v_i; the weights themselves if None.
    """
    weights = for_each(weight, changes)
    if kernels.can_take(base, *changes):
        return kernels.merge_changes(
            base, changes, weights, votes=votes or weights, normalize=normalize, lambda_=lambda_
        )
    voting = [change.mul_(one) if one != 1 else change for change, one in zip(changes, votes or weights, strict=True)]
    sign = sign_or_plus(sum_of(voting))
    merged = torch.zeros_like(sign)
    divisor = torch.zeros_like(sign)
    for one, share, vote in zip(voting, weights, votes or weights, strict=True):
        agreeing = one.mul_(sign).relu_()
        merged.add_(agreeing, alpha=share / vote if vote else 0.0)
        if normalize:
            divisor.add_(agreeing.gt_(0), alpha=share)
    if normalize:
        merged /= one_for_zero(divisor)
    return torch.addcmul(in_float(base), merged, sign, value=lambda_)


def sign_or_plus(values: Weights) -> Weights:
    """-1 for negative numbers, else +1; overwrites them.

    Written as arithmetic: on CPUs torch compares into a tensor of floats five times faster than into one of booleans,
    and selects by a mask thirty times slower than it adds.
    """
    return values.ge_(0).mul_(2).sub_(1)


def one_for_zero(divisor: Weights) -> Weights:
    """1 in the place of 0; overwrites it."""
    return divisor.add_(torch.eq(divisor, 0, out=torch.empty_like(divisor)))


def check_weights(*, weight: PerModel, normalize: bool = False, **others: object) -> None:
    """Refuse weights that sum to 0 where the result is divided by that sum; all 0 leaves the base as it is."""
    weights = [weight] if isinstance(weight, (int, float)) else list(weight)
    if normalize and abs(sum(weights)) < 1e-8 and any(weights):
        raise ValueError(f"`normalize` divides by the sum of the weights, but {weights} sum to 0. Change a weight.")


def check_multislerp(*, weight: PerModel, normalize_weights: bool = True, **others: object) -> None:
    """As `check_mean_weights`, for the option's name in `multislerp`."""
    check_mean_weights(weight=weight, normalize=normalize_weights)


def check_mean_weights(*, weight: PerModel, normalize: bool = True, **others: object) -> None:
    """As `check_weights`, for means of models, where weights that are all 0 have no meaning either."""
    weights = [weight] if isinstance(weight, (int, float)) else list(weight)
    if normalize and abs(sum(weights)) < 1e-8:
        raise ValueError(f"`normalize` divides by the sum of the weights, but {weights} sum to 0. Change a weight.")
