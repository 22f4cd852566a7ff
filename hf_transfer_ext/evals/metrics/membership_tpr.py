from __future__ import annotations

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.evals.metrics.membership_auc import check_scores
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import interval_of


def membership_tpr(
    members: Float[np.ndarray, " members"],
    nonmembers: Float[np.ndarray, " nonmembers"],
    *,
    false_positive_rate: float = 0.01,
    name: str = "membership_tpr",
    resamples: int = 1000,
    seed: int = 0,
) -> Measurement:
    """True positive rate for members (low scores) at a false positive rate of at most `false_positive_rate`.

    An attack that identifies a few members with certainty is a leak that the area under the curve hides. With fewer
    than 1 / false_positive_rate non-members, not a single false positive is allowed.

    Source: Carlini et al., "Membership inference attacks from first principles", 2022,
    https://arxiv.org/abs/2112.03570
    """
    check_scores(members, nonmembers)
    if not 0.0 <= false_positive_rate < 1.0:
        raise ValueError(f"`false_positive_rate` must be in [0, 1), got {false_positive_rate}.")
    allowed = int(false_positive_rate * len(nonmembers))

    def share_found(inside: np.ndarray, outside: np.ndarray) -> float:
        threshold = np.sort(outside)[allowed]  # at most `allowed` non-members have a lower score
        return float((inside < threshold).mean())

    found = share_found(members, nonmembers)
    interval = interval_of(share_found, [[members], [nonmembers]], resamples=resamples, seed=seed)
    unit = f"share of members at {false_positive_rate:g} false positives"
    return Measurement(name, found, unit, False, len(members) + len(nonmembers), interval)
