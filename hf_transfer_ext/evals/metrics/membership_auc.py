from __future__ import annotations

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import interval_of


def check_scores(members: np.ndarray, nonmembers: np.ndarray) -> None:
    """Raise `ValueError` if a sample is empty or contains NaN."""
    for name, sample in (("members", members), ("nonmembers", nonmembers)):
        if len(sample) == 0 or np.isnan(sample).any():
            bad = np.flatnonzero(np.isnan(sample)).tolist()[:5]
            raise ValueError(f"`{name}` needs scores; it has {len(sample)}, NaN at index {bad}.")


def area(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """P(member's score < non-member's) + P(equal) / 2, from the ranks."""
    ordered = np.sort(nonmembers)
    above = len(ordered) - np.searchsorted(ordered, members, side="right")
    equal = np.searchsorted(ordered, members, side="right") - np.searchsorted(ordered, members, side="left")
    return float((above + 0.5 * equal).mean() / len(ordered))


def membership_auc(
    members: Float[np.ndarray, " members"],
    nonmembers: Float[np.ndarray, " nonmembers"],
    *,
    name: str = "membership_auc",
    resamples: int = 1000,
    seed: int = 0,
) -> Measurement:
    """Area under the ROC curve for separating members (low scores) from non-members (high scores).

    .5 is chance level, as for a model that never saw the members; 1 is perfect separation. After unlearning, a value
    well below .5 is also a trace of training: the forgotten examples have become *less* likely than unseen ones.

    Args:
        name: Name of the measurement, to identify the attack that computed the scores.
        resamples: Bootstrap resamples for the interval; members and non-members are drawn independently.

    Source: Fawcett, "An introduction to ROC analysis", 2006, https://doi.org/10.1016/j.patrec.2005.10.010
    """
    check_scores(members, nonmembers)
    interval = interval_of(area, [[members], [nonmembers]], resamples=resamples, seed=seed)
    count = len(members) + len(nonmembers)
    return Measurement(name, area(members, nonmembers), "area under the ROC curve", False, count, interval)
