"""Compare several models side by side: a table for the terminal and a plot for the model card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_transfer_ext.measurement import Measurement

Measured = Mapping[str, Sequence[Measurement]]


def comparison_table(measured: Measured) -> str:
    """One row per metric, one column per model; arrows show which direction is better.

    A missing metric (such as a teacher's divergence from itself) is shown as a dash.
    """
    rows = [["metric", *measured]]
    for name in _metric_names(measured):
        found = {model: _named(values, name) for model, values in measured.items()}
        first = next(m for m in found.values() if m is not None)
        label = f"{name} {'↑' if first.higher_is_better else '↓'} ({first.unit})"
        rows.append([label, *("–" if m is None else f"{m.value:.4g}" for m in found.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def comparison_plot(measured: Measured, path: str | Path, *, title: str = "") -> Path:
    """Write a PNG with one bar chart per metric, with 95 % intervals if available.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: pip install 'hf_transfer_ext[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = _metric_names(measured)
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names) + 0.6, 3.4), squeeze=False)
    colors = [pyplot.get_cmap("tab10")(i) for i in range(len(measured))]
    for axis, name in zip(axes[0], names, strict=True):
        found = {model: m for model, values in measured.items() if (m := _named(values, name)) is not None}
        first = next(iter(found.values()))
        places = [list(measured).index(model) for model in found]
        values = [m.value for m in found.values()]
        axis.bar(places, values, color=[colors[place] for place in places], width=0.7)
        for place, m in zip(places, found.values(), strict=True):
            if m.interval is not None:
                below, above = max(0.0, m.value - m.interval[0]), max(0.0, m.interval[1] - m.value)
                axis.errorbar(place, m.value, [[below], [above]], color="black", capsize=3, linewidth=1)
            axis.annotate(f"{m.value:.3g}", (place, m.value), (4, 2), textcoords="offset points", fontsize=8)
        axis.set_title(f"{name} ({'higher' if first.higher_is_better else 'lower'} is better)", fontsize=9)
        axis.set_ylabel(first.unit, fontsize=8)
        axis.set_xticks(range(len(measured)), list(measured), rotation=30, ha="right", fontsize=8)
        axis.margins(y=0.15)
        if min(values) > 0 and max(values) > 50 * min(values):
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure of matplotlib as `.png` or `.svg`, atomically and without the time of day, and close it."""
    from matplotlib import pyplot, rc_context

    path = Path(path)
    aside = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        with rc_context({"svg.hashsalt": "hf_transfer_ext", "svg.fonttype": "none"}):
            is_svg = path.suffix.lower() == ".svg"
            figure.savefig(aside, dpi=130, metadata={"Date": None} if is_svg else None)
        os.replace(aside, path)
    finally:
        pyplot.close(figure)
        aside.unlink(missing_ok=True)
    return path


def _metric_names(measured: Measured) -> list[str]:
    """Names in the order in which they first appear."""
    return list(dict.fromkeys(m.name for values in measured.values() for m in values))


def _named(values: Sequence[Measurement], name: str) -> Measurement | None:
    return next((m for m in values if m.name == name), None)
