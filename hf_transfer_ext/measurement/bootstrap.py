"""Bootstrap resampling: all confidence intervals are computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Drawn = Float[np.ndarray, " resamples"]


def resampled(
    statistic: Callable[..., float], groups: Sequence[Sequence[np.ndarray]], *, resamples: int = 1000, seed: int = 0
) -> Drawn:
    """Compute `statistic` on examples drawn with replacement, `resamples` times.

    Args:
        statistic: Function of all arrays of all groups, in order.
        groups: The arrays of one group belong to the same examples and are resampled together (scores of two models
            on one set); groups are resampled independently (members and non-members).

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
        high_draws: Separate values for the upper end, if each resample gives a range.
    """
    high_draws = low_draws if high_draws is None else high_draws
    if not len(low_draws):
        return None
    return float(np.quantile(low_draws, 0.025)), float(np.quantile(high_draws, 0.975))


def interval_of(
    statistic: Callable[..., float], groups: Sequence[Sequence[np.ndarray]], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of `statistic` over its examples; None if a group has fewer than two.

    It only covers the sampling of examples, not the variation between training seeds.
    """
    if resamples < 1 or min(len(group[0]) for group in groups) < 2:
        return None
    return percentile_interval(resampled(statistic, groups, resamples=resamples, seed=seed))


def mean_interval(
    values: Float[np.ndarray, " examples"], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """`interval_of` the unweighted mean."""
    return interval_of(lambda drawn: float(drawn.mean()), [[values]], resamples=resamples, seed=seed)
