"""Render drawings as PNG images, for a model card or a paper."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path as FilePath
from typing import Any

from hf_transfer_ext.evals.audit.report.drawings import COLORS, FONT_SIZE, Dot, Drawing, Label, Path, Rect

HAS_MATPLOTLIB = find_spec("matplotlib") is not None

#: Drawing pixels per inch of the figure, and image pixels per inch.
UNITS_PER_INCH, DPI = 80, 160


def save_png(path: str | FilePath, drawing: Drawing) -> FilePath:
    """Write one drawing to a PNG file, atomically.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not HAS_MATPLOTLIB:
        raise ImportError("The PNG charts need matplotlib: pip install 'hf_transfer_ext[demo]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (drawing.width / UNITS_PER_INCH, drawing.height / UNITS_PER_INCH)
    figure = pyplot.figure(figsize=size, facecolor="white")
    try:
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_xlim(0, drawing.width)
        axis.set_ylim(drawing.height, 0)
        axis.axis("off")
        for shape in drawing.shapes:
            _draw(axis, shape)
        path = FilePath(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.stem}.partial-{os.getpid()}.png")
        figure.savefig(aside, dpi=DPI)
        os.replace(aside, path)
    finally:
        pyplot.close(figure)
    return path


def save_pngs(folder: str | FilePath, drawings: Mapping[str, Drawing]) -> list[FilePath]:
    """Write each drawing as `<name>.png`, and return the paths."""
    return [save_png(FilePath(folder) / f"{name}.png", drawing) for name, drawing in drawings.items()]


def _draw(axis: Any, shape: Any) -> None:
    from matplotlib import patches

    color = COLORS[shape.role]
    points_per_unit = 72 / UNITS_PER_INCH
    if isinstance(shape, Rect):
        face = color if shape.filled else "none"
        edge = "none" if shape.filled else color
        axis.add_patch(
            patches.Rectangle((shape.x, shape.y), shape.width, shape.height, facecolor=face, edgecolor=edge)
        )
    elif isinstance(shape, Path):
        across, down = zip(*shape.points, strict=True)
        axis.plot(across, down, color=color, linewidth=shape.width * points_per_unit)
    elif isinstance(shape, Dot):
        axis.add_patch(patches.Circle((shape.x, shape.y), shape.radius, facecolor=color))
    elif isinstance(shape, Label):
        axis.text(
            shape.x, shape.y, shape.text, color=color, fontsize=FONT_SIZE * points_per_unit, parse_math=False,
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
            va="center" if shape.vertical else "baseline", rotation=90 if shape.vertical else 0,
        )  # fmt: skip
