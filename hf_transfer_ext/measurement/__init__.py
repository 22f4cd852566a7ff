"""A measured value with its name, unit and direction."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One result: its value, its unit, which direction is better, and the number of examples behind it.

    Args:
        name: Name of the metric, which is also the name of its file.
        value: The measured number.
        unit: "nats per token", "share", "p-value", ...
        higher_is_better: The direction of improvement.
        examples: How many examples (or tokens, where the unit is per token) the value was measured on.
        interval: 95 % interval (low, high), where one was computed.
        dataset: What it was measured on, as a report shows it.
    """

    name: str
    value: float
    unit: str
    higher_is_better: bool
    examples: int
    interval: tuple[float, float] | None = None
    dataset: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
