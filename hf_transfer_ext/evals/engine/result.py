"""The result of an evaluation: the measurements, the examples behind them, and saving both to files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.files import write_text
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.scoring import ScoredExample


@dataclass
class EvaluationResult:
    """The measurements, and what they were computed from.

    Args:
        measurements: One per metric, in the order of the metrics.
        scored: Every example with its per-token scores and its generation.
        values: Measurement name -> value of each example; NaN if the example was left out.
        problems: One sentence for each example that a metric could not use.
        cost: Tokens and passes that were computed, summed over all processes.
    """

    measurements: list[Measurement]
    scored: list[ScoredExample]
    values: dict[str, Float[np.ndarray, " examples"]]
    problems: list[str] = field(default_factory=list)
    cost: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Measurement:
        """The measurement with this name; options in parentheses may be omitted if the name is still unique."""
        found = [m for m in self.measurements if m.name == name or m.name.split("(")[0] == name]
        if len(found) != 1:
            raise KeyError(f"{name!r} is not one measurement of {[m.name for m in self.measurements]}.")
        return found[0]

    def per_example(self) -> list[dict[str, Any]]:
        """One row per example: its texts, its generation and the value of each metric (None if left out)."""
        rows = []
        for place, scored in enumerate(self.scored):
            values = {name: None if np.isnan(v[place]) else float(v[place]) for name, v in self.values.items()}
            generation = {} if scored.generation is None else {"generation": scored.generation}
            rows.append({"index": scored.index, **scored.example, **generation, "metrics": values})
        return rows

    def save(self, folder: str | Path, *, per_example: str = "jsonl") -> Path:
        """Write `measurements.json`, and the examples as `per_example.jsonl` or `per_example.parquet`.

        Raises:
            ValueError: `per_example` is neither "jsonl" nor "parquet".
        """
        if per_example not in ("jsonl", "parquet"):
            raise ValueError(f"`per_example` must be jsonl or parquet, got {per_example!r}.")
        folder = Path(folder)
        summary = {
            "measurements": [m.to_dict() for m in self.measurements],
            "problems": self.problems,
            "cost": self.cost,
        }
        write_text(folder / "measurements.json", json.dumps(summary, indent=2) + "\n")
        rows = self.per_example()
        if per_example == "parquet":
            write_parquet(folder / "per_example.parquet", rows)
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / "per_example.jsonl", lines)
        return folder


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One column for each key of any row, `metrics` as a struct; values of mixed types are stored as JSON."""
    import pyarrow
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        as_json = name != "metrics" and any(isinstance(value, dict) for value in values)
        try:
            columns[name] = pyarrow.array([json.dumps(v, ensure_ascii=False) for v in values] if as_json else values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            columns[name] = pyarrow.array([json.dumps(value, ensure_ascii=False) for value in values])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    parquet.write_table(pyarrow.table(columns), aside)
    aside.replace(path)
