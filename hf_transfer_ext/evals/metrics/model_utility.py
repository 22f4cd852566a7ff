from __future__ import annotations

from collections.abc import Mapping

from hf_transfer_ext.measurement import Measurement


def model_utility(parts: Mapping[str, Measurement]) -> Measurement:
    r"""Harmonic mean of measurements in [0, 1]: one that is 0 makes the whole 0.

    TOFU takes nine: {retain, real authors, world facts} x {probability, ROUGE-L recall, truth ratio with the role
    "retain"}, where the probability of the two sets with multiple choice is `choice_probability`.

    .. math:: \frac{k}{\sum_i 1 / u_i}

    Raises:
        ValueError: No part, or a part outside [0, 1].

    Source: TOFU, Maini et al. 2024, section 2.2, https://arxiv.org/abs/2401.06121
    """
    if not parts:
        raise ValueError("Model utility needs at least one measurement.")
    for name, part in parts.items():
        if not 0.0 <= part.value <= 1.0:
            raise ValueError(f"Model utility is a mean of shares in [0, 1]; {name!r} is {part.value} {part.unit}.")
    values = [part.value for part in parts.values()]
    mean = 0.0 if min(values) == 0.0 else len(values) / sum(1.0 / value for value in values)
    return Measurement(
        "model_utility", mean, "harmonic mean of shares", True, sum(part.examples for part in parts.values())
    )
