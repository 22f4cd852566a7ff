from __future__ import annotations

from hf_transfer_ext.measurement import Measurement


def retention(
    source_base: Measurement, source_adapted: Measurement, target_base: Measurement, target_adapted: Measurement
) -> Measurement:
    r"""Share of an adapter's gain that is kept after it was moved to another base.

    .. math:: \frac{m_{target}^{adapted} - m_{target}^{base}}{m_{source}^{adapted} - m_{source}^{base}}

    1 where the whole gain arrived; over 1 where it grew; under 0 where the moved adapter does harm. The four numbers
    must be of one metric on one set.

    Raises:
        ValueError: Different metrics, or an adapter that gained nothing at its source.

    Source: this package's own definition.
    """
    names = {m.name for m in (source_base, source_adapted, target_base, target_adapted)}
    if len(names) != 1:
        raise ValueError(f"Retention compares one metric, got {', '.join(sorted(names))}.")
    direction = 1.0 if source_base.higher_is_better else -1.0
    gain = direction * (source_adapted.value - source_base.value)
    if gain <= 0:
        raise ValueError(
            f"At its source the adapter moved {source_base.name} from {source_base.value:.4g} to "
            f"{source_adapted.value:.4g}, which is no gain: there is nothing to retain."
        )
    kept = direction * (target_adapted.value - target_base.value) / gain
    return Measurement("retention", kept, "share of the source's gain", True, target_adapted.examples)
