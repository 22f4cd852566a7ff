from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.measurement import Measurement


def kolmogorov_smirnov(
    first: Float[np.ndarray, " examples"], second: Float[np.ndarray, " references"]
) -> tuple[float, float]:
    """(largest distance of the two empirical distributions, exact two-sided p-value without ties taken apart).

    The p-value is the share of all interleavings of the two samples whose distance is at least as large. Walking
    through the samples in order is a path on a grid; the share of paths that ever reach the distance is added up as
    it leaves the inner region, so that a p-value of 1e-200 keeps its digits.

    Source: Hodges, "The significance probability of the Smirnov two-sample test", 1958,
    https://doi.org/10.1007/BF02589501
    """
    n, m = len(first), len(second)
    pooled = np.concatenate([first, second])
    below_first = np.searchsorted(np.sort(first), pooled, side="right")
    below_second = np.searchsorted(np.sort(second), pooled, side="right")
    reached = int(np.abs(below_first * m - below_second * n).max())  # distance * n * m, an integer
    if reached == 0:
        return 0.0, 1.0
    # inside[i]: probability that a random path stands at (i, step - i) and has not reached the distance yet.
    inside = np.zeros(n + 1)
    inside[0] = 1.0
    outside = 0.0
    i = np.arange(n + 1)
    for step in range(n + m):
        j = step - i
        here = (j >= 0) & (j <= m)
        to_first = np.where(here, (n - i) / (n + m - step), 0.0)
        moved = np.zeros(n + 1)
        moved[1:] = (inside * to_first)[:-1]
        moved += inside * np.where(here, 1.0 - to_first, 0.0)
        j = step + 1 - i
        leaves = np.abs(i * m - j * n) >= reached
        outside += moved[leaves].sum()
        inside = np.where(leaves | (j < 0) | (j > m), 0.0, moved)
    return reached / (n * m), min(1.0, float(outside))


def forget_quality(
    unlearned: Float[np.ndarray, " examples"], retrained: Float[np.ndarray, " references"]
) -> list[Measurement]:
    """p-value of a two-sample Kolmogorov-Smirnov test on the truth ratios of the forget set.

    High where the unlearned model cannot be told from one that was trained without the forget set. One p-value from
    one seed says little: an independent rerun of a published .92 found .018 +- .021 over five seeds. The two samples
    should come from the same examples, and from the same definition of the truth ratio.

    Returns:
        `forget_quality` (p-value) and `forget_quality_log10` (its decimal logarithm, where methods differ).

    Raises:
        ValueError: A sample is empty or holds a value that is not finite.

    Source: TOFU, Maini et al. 2024, section 2.2, https://arxiv.org/abs/2401.06121
    """
    for name, sample in (("unlearned", unlearned), ("retrained", retrained)):
        if len(sample) == 0 or not np.isfinite(sample).all():
            bad = np.flatnonzero(~np.isfinite(sample)).tolist()[:5]
            raise ValueError(
                f"`{name}` needs finite truth ratios; it has {len(sample)} values, not finite at index {bad}."
            )
    _, p_value = kolmogorov_smirnov(unlearned.astype(np.float64), retrained.astype(np.float64))
    log10 = math.log10(p_value) if p_value > 0 else -math.inf
    return [
        Measurement("forget_quality", p_value, "p-value", True, len(unlearned)),
        Measurement("forget_quality_log10", log10, "log10 of the p-value", True, len(unlearned)),
    ]
