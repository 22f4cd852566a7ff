"""Shared arithmetic for methods on changes (task vectors): subtract the base, weighted sums, sign election."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.method import for_each, in_float
from hf_transfer_ext.weights.dtypes import is_tensor

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from hf_transfer_ext.merging.types import PerModelCoefficient, Values, Weights


def changes_of(base: Values, models: Sequence[Values]) -> list[Weights]:
    """t_i = theta_i - theta_0, in at least float32."""
    start = in_float(base)
    return [in_float(model) - start for model in models]


def sum_of(tensors: Iterable[Weights]) -> Weights:
    """sum_i x_i, in the order of the tensors."""
    first, *others = tensors
    total = first
    for tensor in others:
        total = total + tensor
    return total


def weighted_sum(tensors: Sequence[Weights], weights: Sequence[Any] | Float[Tensor, " models"]) -> Weights:
    """sum_i w_i x_i; in one compiled pass if no gradient is needed.

    Args:
        weights: Numbers or one-element tensors; float64 tensors are rounded to the dtype of the x_i.
    """
    factors = list(weights)
    if kernels.can_take(*tensors) and not any(is_tensor(one) and one.requires_grad for one in factors):
        return kernels.tensor_of(kernels.merge_changes(None, tensors, [float(one) for one in factors]))
    return sum_of(in_float(tensor) * one for one, tensor in zip(factors, tensors, strict=True))


def elect_sign(votes: Sequence[Weights]) -> Weights:
    """The sign of sum_i v_i, element by element: +1 (also for a sum of 0) or -1 (TIES, "elect")."""
    import torch

    total = sum_of(votes).detach() + 0.0  # turns -0 into 0
    return torch.ones_like(total).copysign(total)


def one_for_zero(divisor: Weights) -> Weights:
    """The divisor, with 0 replaced by 1."""
    return divisor + (divisor == 0)


def check_weights(*, weight: PerModelCoefficient, normalize: bool = False, **others: object) -> None:
    """Refuse weights that sum to 0 if the result is divided by their sum; if all are 0, the base stays unchanged."""
    if any(_numbers(weight)):
        check_mean_weights(weight=weight, normalize=normalize)


def check_multislerp(*, weight: PerModelCoefficient, normalize_weights: bool = True, **others: object) -> None:
    """Like `check_mean_weights`, with the option name of `multislerp`."""
    check_mean_weights(weight=weight, normalize=normalize_weights)


def check_mean_weights(*, weight: PerModelCoefficient, normalize: bool = True, **others: object) -> None:
    """Like `check_weights`, for means of models, where weights that are all 0 are also invalid."""
    weights = _numbers(weight)
    if normalize and abs(sum(weights)) < 1e-8:
        raise ValueError(f"`normalize` divides by the sum of the weights, but {weights} sum to 0. Change the weights.")


def _numbers(weight: PerModelCoefficient) -> list[float]:
    """The weights as numbers. A single weight for all models counts once, since their number is unknown here."""
    count = 1 if isinstance(weight, (int, float)) or (is_tensor(weight) and not weight.dim()) else len(weight)
    return [float(one.detach() if is_tensor(one) else one) for one in for_each(weight, count)]
