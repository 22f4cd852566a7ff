from __future__ import annotations

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import mean_interval


def histogram_divergence(
    first: Float[np.ndarray, " models"], second: Float[np.ndarray, " oracles"], bins: int, floor: float = 1e-5
) -> float:
    """KL(first || second) of histograms over the pooled range; an empty bin counts as `floor`. In nats."""
    low, high = min(first.min(), second.min()), max(first.max(), second.max())
    if low == high:
        return 0.0
    edges = np.linspace(low, high, bins + 1)
    p, q = (np.histogram(sample, edges)[0] / len(sample) + floor for sample in (first, second))
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def klom(
    unlearned: Float[np.ndarray, "models examples"],
    oracles: Float[np.ndarray, "oracles oracle_examples"],
    *,
    bins: int = 20,
    clip: float = 100.0,
) -> Measurement:
    r"""KL divergence of margins between unlearned and retrained models, averaged over examples.

    For each example, the margins of many unlearned models form one histogram and those of many models retrained
    without the forget set another; the result is the mean over examples of KL(unlearned || oracle). Comparing two
    halves of the oracles gives its floor. It needs tens of models on each side, so it is not for single runs.

    Args:
        unlearned: Values of the metric `margin`, one row per model.
        oracles: The same for retrained models, on the same examples.
        bins: Bins of the histograms, over the joint range of both samples of an example.
        clip: Margins are clipped to [-clip, clip].

    Raises:
        ValueError: The sides have different examples, or fewer than two models.

    The paper does not specify how to treat empty bins: here, 1e-5 is added to the share of each bin.

    Source: Georgiev et al., "Attribute-to-delete: machine unlearning via datamodel matching", 2024,
    https://arxiv.org/abs/2410.23232
    """
    if unlearned.shape[1] != oracles.shape[1]:
        raise ValueError(
            f"Both sides need the same examples: {unlearned.shape[1]} unlearned and {oracles.shape[1]} of the oracles."
        )
    if min(len(unlearned), len(oracles)) < 2:
        raise ValueError(f"A histogram needs at least two models: {len(unlearned)} unlearned, {len(oracles)} oracles.")
    clipped = [np.clip(side, -clip, clip) for side in (unlearned, oracles)]
    values = np.array([histogram_divergence(a, b, bins) for a, b in zip(clipped[0].T, clipped[1].T, strict=True)])
    interval = mean_interval(values)
    return Measurement("klom", float(values.mean()), "nats", False, len(values), interval)
