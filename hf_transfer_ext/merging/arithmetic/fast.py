"""Merge methods in one compiled pass over memory: the fast forms that the method files declare.

Each returns the same as the torch implementation of its method, up to float32 rounding, for arrays and for tensors on
the CPU without gradients (`kernels.can_take`); `MergeMethod` checks this before it calls one. The arguments are those
of the method. If it returns None, the torch implementation must be used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.geometry import slerp_factors
from hf_transfer_ext.merging.arithmetic.noise import Noise, limit_of
from hf_transfer_ext.merging.arithmetic.trimming import PLACE_BITS, bits_of_places, limits_and_scales
from hf_transfer_ext.merging.method import PerModel, for_each

if TYPE_CHECKING:
    from hf_transfer_ext.merging.types import PerModelCoefficient, Values


def linear_by_kernels(
    base: Values | None, models: Sequence[Values], *, weight: PerModelCoefficient, normalize: bool
) -> Values:
    weights = _floats(weight, models)
    total = kernels.merge_changes(None, models, weights)
    if normalize:
        total /= sum(weights)
    return total


def slerp_by_kernels(base: Values, models: Sequence[Values], *, t: float, gram: Any) -> Values:
    factors = slerp_factors(gram[0, 0], gram[0, 1], gram[1, 1], t, parallel=0.9995)
    return kernels.merge_changes(None, [base, *models], [float(factor) for factor in factors])


def task_arithmetic_by_kernels(base: Values, models: Sequence[Values], **options: Any) -> Values:
    return _sum(base, models, None, **options)


def ties_by_kernels(
    base: Values, models: Sequence[Values], *, thresholds: Sequence[float], scales: Sequence[Any], **options: Any
) -> Values:
    masks = [kernels.Kept(low=low, scale=float(scale)) for low, scale in zip(thresholds, scales, strict=True)]
    return _sum_of_agreeing(base, models, masks, **options)


def breadcrumbs_by_kernels(
    base: Values,
    models: Sequence[Values],
    *,
    bounds: Sequence[tuple[float, float]],
    scales: Sequence[Any],
    **options: Any,
) -> Values:
    return _sum(base, models, _between(bounds, scales), **options)


def breadcrumbs_ties_by_kernels(
    base: Values,
    models: Sequence[Values],
    *,
    bounds: Sequence[tuple[float, float]],
    scales: Sequence[Any],
    **options: Any,
) -> Values:
    return _sum_of_agreeing(base, models, _between(bounds, scales), **options)


def dare_linear_by_kernels(base: Values, models: Sequence[Values], **options: Any) -> Values | None:
    counter = options["noise"].counter(math.prod(base.shape))
    return None if counter is None else _sum(base, models, _random(models, **options), counter, **options)


def dare_ties_by_kernels(base: Values, models: Sequence[Values], **options: Any) -> Values | None:
    counter = options["noise"].counter(math.prod(base.shape))
    return None if counter is None else _sum_of_agreeing(base, models, _random(models, **options), counter, **options)


def della_by_kernels(
    base: Values,
    models: Sequence[Values],
    *,
    weight: PerModelCoefficient,
    normalize: bool,
    lambda_: float,
    **kept: Any,
) -> Values | None:
    changes = _dropped_by_rank(base, models, **kept)
    if changes is None:
        return None
    weights = _floats(weight, models)
    return kernels.merge_changes(
        base, changes, weights, votes=weights, normalize=normalize, lambda_=float(lambda_)
    )  # fmt: skip


def della_linear_by_kernels(
    base: Values,
    models: Sequence[Values],
    *,
    weight: PerModelCoefficient,
    normalize: bool,
    lambda_: float,
    **kept: Any,
) -> Values | None:
    changes = _dropped_by_rank(base, models, **kept)
    if changes is None:
        return None
    weights = _floats(weight, models)
    return kernels.merge_changes(base, changes, weights, lambda_=_strength(weights, normalize, lambda_))


def sce_by_kernels(
    base: Values, models: Sequence[Values], *, threshold: float, shares: Sequence[Any], **options: Any
) -> Values:
    return kernels.merge_changes(
        base, models, [float(share) for share in shares], subtract=True, variance=threshold,
        votes=[1.0] * len(models), normalize=True,
    )  # fmt: skip


def _sum(
    base: Values,
    models: Sequence[Values],
    masks: Sequence[kernels.Kept] | None,
    counter: int = 0,
    *,
    weight: PerModelCoefficient,
    normalize: bool,
    lambda_: float,
    **options: Any,
) -> Values:
    """theta_0 + lambda sum_i w_i m_i t_i, divided by sum_i w_i with `normalize`."""
    weights = _floats(weight, models)
    return kernels.merge_changes(
        base, models, weights, subtract=True, masks=masks, counter=counter,
        lambda_=_strength(weights, normalize, lambda_),
    )  # fmt: skip


def _sum_of_agreeing(
    base: Values,
    models: Sequence[Values],
    masks: Sequence[kernels.Kept],
    counter: int = 0,
    *,
    weight: PerModelCoefficient,
    normalize: bool,
    lambda_: float,
    **options: Any,
) -> Values:
    """theta_0 + lambda times the sum of the w_i m_i t_i that agree in sign, divided by their w_i with `normalize`."""
    weights = _floats(weight, models)
    return kernels.merge_changes(
        base, models, weights, subtract=True, masks=masks, counter=counter, votes=weights, normalize=normalize,
        lambda_=float(lambda_),
    )  # fmt: skip


def _strength(weights: Sequence[float], normalize: bool, lambda_: float) -> float:
    """lambda, divided by the sum of the weights with `normalize`; 0 if all of them are 0."""
    if not normalize:
        return float(lambda_)
    total = sum(weights)
    return float(lambda_) / total if total else 0.0


def _between(bounds: Sequence[tuple[float, float]], scales: Sequence[Any]) -> list[kernels.Kept]:
    return [
        kernels.Kept(low=low, high=high, scale=float(scale)) for (low, high), scale in zip(bounds, scales, strict=True)
    ]


def _random(
    models: Sequence[Values], *, density: PerModel, rescale: bool, noise: Noise, **options: Any
) -> list[kernels.Kept]:
    masks = []
    for i, share in enumerate(for_each(density, models)):
        if share >= 1:
            masks.append(kernels.Kept())
        else:
            scale = 1 / share if rescale and share > 0 else 1.0
            masks.append(kernels.Kept(scale=scale, limit=limit_of(share), keys=noise.keys(i)))
    return masks


def _dropped_by_rank(
    base: Values, models: Sequence[Values], *, density: PerModel, epsilon: PerModel, rescale: bool, noise: Noise
) -> list[Values] | None:
    """`trimming.drop_by_rank` of each model's change."""
    counter = noise.counter(math.prod(base.shape))
    if counter is None:
        return None
    columns = base.shape[1]
    kept = []
    for i, (model, share, spread) in enumerate(
        zip(models, for_each(density, models), for_each(epsilon, models), strict=True)
    ):
        if share >= 1:
            kept.append(kernels.merge_changes(None, [model, base], [1.0, -1.0]))
        elif share <= 0:
            kept.append(kernels.merge_changes(None, [model], [1.0], masks=[kernels.Kept(limit=0)]))  # all dropped
        else:
            limits, scales = limits_and_scales(share, spread, columns, rescale)
            width = bits_of_places(columns)
            kept.append(
                kernels.drop_by_rank(
                    base, model, limits, scales, width=width, wide=width > PLACE_BITS, counter=counter,
                    keys=noise.keys(i),
                )
            )  # fmt: skip
    return kept


def _floats(weight: PerModelCoefficient, models: Sequence[Values]) -> list[float]:
    return [float(one) for one in for_each(weight, models)]
