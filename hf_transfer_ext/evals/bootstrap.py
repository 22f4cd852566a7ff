"""The bootstrap: how far a number moves when its examples are drawn again. One place for all intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Drawn = Float[np.ndarray, " resamples"]


def resampled(
    statistic: Callable[..., float], groups: Sequence[Sequence[np.ndarray]], *, resamples: int = 1000, seed: int = 0
) -> Drawn:
    """`statistic` on examples drawn with replacement, `resamples` times.

    Args:
        statistic: Function of all arrays of all groups, in order.
        groups: The arrays of one group are about the same examples and are drawn together (scores of two models on
            one set); groups are drawn independently (members and non-members).

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979, https://doi.org/10.1214/aos/1176344552
    """
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(group[0]), size=(resamples, len(group[0]))) for group in groups]
    drawn = [
        statistic(*(array[draw[turn]] for group, draw in zip(groups, draws, strict=True) for array in group))
        for turn in range(resamples)
    ]
    return np.asarray(drawn, dtype=np.float64)


def percentile_interval(low_draws: Drawn, high_draws: Drawn | None = None) -> tuple[float, float] | None:
    """95 % percentile interval of resampled values; None without any.

    Args:
        high_draws: The upper end's own values, where a resample leaves open a whole range.
    """
    high_draws = low_draws if high_draws is None else high_draws
    if not len(low_draws):
        return None
    return float(np.quantile(low_draws, 0.025)), float(np.quantile(high_draws, 0.975))


def interval_of(
    statistic: Callable[..., float], groups: Sequence[Sequence[np.ndarray]], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of `statistic` over its examples; None where a group has fewer than two.

    It covers the sampling of examples alone: another training seed is another matter.
    """
    if resamples < 1 or min(len(group[0]) for group in groups) < 2:
        return None
    return percentile_interval(resampled(statistic, groups, resamples=resamples, seed=seed))


def mean_interval(
    values: Float[np.ndarray, " examples"], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """`interval_of` the plain mean."""
    return interval_of(lambda drawn: float(drawn.mean()), [[values]], resamples=resamples, seed=seed)
