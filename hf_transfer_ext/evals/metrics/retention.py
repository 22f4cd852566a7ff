from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import interval_of


def retention(
    source_base: Measurement,
    source_adapted: Measurement,
    target_base: Measurement,
    target_adapted: Measurement,
    *,
    scores: Sequence[np.ndarray] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Measurement:
    r"""Share of an adapter's gain that is retained after its transfer to another base model.

    .. math:: \frac{m_{target}^{adapted} - m_{target}^{base}}{m_{source}^{adapted} - m_{source}^{base}}

    1 if the full gain is retained, > 1 if it increased, < 0 if the transferred adapter does harm. All four numbers
    must be from the same metric on the same set.

    Args:
        scores: Values of the same examples from each of the four, whose means are the four numbers. Without them, or
            where some resample has no gain on the source, so that the share has no bound, there is no interval.
        resamples: Bootstrap resamples for the interval; examples are drawn jointly.

    Raises:
        ValueError: The metrics differ, or the adapter has no gain on its source model.

    Source: this package's own definition.
    """
    names = {m.name for m in (source_base, source_adapted, target_base, target_adapted)}
    if len(names) != 1:
        raise ValueError(f"Retention compares one metric, got {', '.join(sorted(names))}.")
    direction = 1.0 if source_base.higher_is_better else -1.0
    gain = direction * (source_adapted.value - source_base.value)
    if gain <= 0:
        raise ValueError(
            f"On its source model, the adapter changed {source_base.name} from {source_base.value:.4g} to "
            f"{source_adapted.value:.4g}, which is not a gain: there is nothing to retain."
        )
    kept = direction * (target_adapted.value - target_base.value) / gain

    def share(source: np.ndarray, adapted: np.ndarray, target: np.ndarray, moved: np.ndarray) -> float:
        gained = direction * float(adapted.mean() - source.mean())
        return direction * float(moved.mean() - target.mean()) / gained if gained > 0 else float("nan")

    interval = interval_of(share, [list(scores)], resamples=resamples, seed=seed) if len(scores) else None
    bounded = interval if interval is None or np.isfinite(interval).all() else None
    return Measurement("retention", kept, "share of the source's gain", True, target_adapted.examples, bounded)
