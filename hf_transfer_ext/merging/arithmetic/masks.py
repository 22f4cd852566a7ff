"""What is kept of the models' changes, and the sum of it: the arithmetic of TIES, DARE and Breadcrumbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.changes import (
    Weights,
    add_changes,
    add_elected_changes,
    changes_of,
    strength_of,
)
from hf_transfer_ext.merging.arithmetic.noise import Noise, limit_of
from hf_transfer_ext.merging.arithmetic.selection import keep_magnitudes
from hf_transfer_ext.merging.arithmetic.trimming import drop_at_random
from hf_transfer_ext.merging.method import PerModel, for_each


@dataclass(frozen=True)
class Mask:
    """What is kept of a change t.

    Args:
        low: The smallest |t| that is kept.
        high: The largest |t| that is kept.
        share: The probability with which an element is kept.
        scale: The factor of what is kept.
    """

    low: float = 0.0
    high: float = float("inf")
    share: float = 1.0
    scale: float = 1.0


def merge_masked_changes(
    base: Weights,
    models: Sequence[Weights],
    weight: PerModel,
    masks: Sequence[Mask],
    *,
    elect: bool,
    normalize: bool,
    lambda_: float,
    noise: Noise = Noise(),  # noqa: B008
) -> Weights:
    """theta_0 + lambda sum_i w_i m_i t_i; with `elect` only of what agrees in sign (`changes.add_elected_changes`)."""
    counter = noise.counter(base.numel())
    if counter is not None and kernels.can_take(base, *models):
        weights = for_each(weight, models)
        return kernels.merge_changes(
            base,
            models,
            weights,
            lambda_=lambda_ if elect else strength_of(weights, normalize, lambda_),
            subtract=True,
            masks=[_compiled(mask, noise, i) for i, mask in enumerate(masks)],
            counter=counter,
            votes=weights if elect else None,
            normalize=elect and normalize,
        )
    kept = []
    for i, (change, mask) in enumerate(zip(changes_of(base, models), masks, strict=True)):
        change = drop_at_random(keep_magnitudes(change, mask.low, mask.high), mask.share, noise=noise, model=i)
        kept.append(change if mask.scale == 1 else change.mul_(mask.scale))
    add = add_elected_changes if elect else add_changes
    return add(base, kept, weight, normalize=normalize, lambda_=lambda_)


def random_masks(density: PerModel, models: Sequence[Weights], *, rescale: bool) -> list[Mask]:
    """DARE's: each element with probability d_i, and with `rescale` divided by it, so that the expectation stays."""
    return [
        Mask(share=share, scale=1 / share if rescale and 0 < share < 1 else 1.0) for share in for_each(density, models)
    ]


def _compiled(mask: Mask, noise: Noise, model: int) -> kernels.Kept:
    if mask.share >= 1:
        return kernels.Kept(mask.low, mask.high, mask.scale)
    return kernels.Kept(mask.low, mask.high, mask.scale, limit_of(mask.share), noise.keys(model))
