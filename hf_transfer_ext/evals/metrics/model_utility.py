from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import percentile_interval


def harmonic_mean(values: Sequence[float]) -> float:
    """k / sum of 1/value over k values in [0, 1]; 0 if any of them is 0."""
    return 0.0 if min(values) <= 0.0 else len(values) / sum(1.0 / value for value in values)


def model_utility(
    parts: Mapping[str, Measurement], *, drawn: Float[np.ndarray, "parts resamples"] | None = None
) -> Measurement:
    r"""Harmonic mean of measurements in [0, 1]; 0 if any of them is 0.

    TOFU uses nine: {retain, real authors, world facts} x {probability, ROUGE-L recall, truth ratio with the role
    "retain"}, where the probability of the two multiple-choice sets is `choice_probability`.

    .. math:: \frac{k}{\sum_i 1 / u_i}

    Args:
        drawn: The parts on resampled examples, in the order of `parts` (`resampled_summaries` of each set, which draws
            the same examples for all metrics of the set). Without it the result has no interval.

    Raises:
        ValueError: There are no parts, or a part is outside [0, 1].

    Source: TOFU, Maini et al. 2024, section 2.2, https://arxiv.org/abs/2401.06121
    """
    if not parts:
        raise ValueError("Model utility needs at least one measurement.")
    for name, part in parts.items():
        if not 0.0 <= part.value <= 1.0:
            raise ValueError(f"Model utility is a mean of shares in [0, 1], but {name!r} is {part.value} {part.unit}.")
    if drawn is not None and len(drawn) != len(parts):
        raise ValueError(f"`drawn` needs one row for each of the {len(parts)} parts, but has {len(drawn)}.")
    mean = harmonic_mean([part.value for part in parts.values()])
    interval = None
    if drawn is not None and drawn.shape[1]:
        known = drawn[:, ~np.isnan(drawn).any(0)]
        interval = percentile_interval(np.array([harmonic_mean(column.tolist()) for column in known.T]))
    examples = sum(part.examples for part in parts.values())
    return Measurement("model_utility", mean, "harmonic mean of shares", True, examples, interval)
