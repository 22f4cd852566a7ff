"""The charts of an audit as shapes, rendered as SVG in the report and as PNG for a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_transfer_ext.evals.audit.verdict import Verdict
from hf_transfer_ext.measurement import Measurement

#: Role of a shape -> its color in a PNG; the style sheet of the report has the same names, for light and dark mode.
COLORS = {
    "ink": "#1c2430",
    "soft": "#5b6675",
    "line": "#d8dee6",
    "bar": "#2f6fb2",
    "bad": "#c0392b",
    "good": "#2e8b57",
    "third": "#b7791f",
}

#: Colors of the models, in order.
SERIES = ("bar", "bad", "good", "third", "soft")

#: Colors of the attackers' access levels.
ACCESS_ROLES = {"prompts": "bar", "weights": "third", "fine-tuning": "bad", "membership": "soft"}

FONT_SIZE = 13
#: Width of a character in font sizes, rounded up so that adjacent labels never overlap.
CHARACTER = 0.62
LEFT, TOP, PLOT_WIDTH = 60, 16, 340


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    role: str
    filled: bool = True


@dataclass(frozen=True)
class Path:
    points: tuple[tuple[float, float], ...]
    role: str
    width: float = 1.0


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    radius: float
    role: str


@dataclass(frozen=True)
class Label:
    """A single line of text. `anchor` is the part of it at (x, y): start, middle or end."""

    x: float
    y: float
    text: str
    role: str = "ink"
    anchor: str = "start"
    vertical: bool = False


Shape = Rect | Path | Dot | Label


@dataclass
class Drawing:
    """Shapes on a canvas of `width` x `height` pixels, with the origin in the upper left corner.

    Args:
        title: Alternative text for readers who cannot see the chart.
    """

    title: str
    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)


def text_width(text: str) -> float:
    return len(text) * CHARACTER * FONT_SIZE


def fitted(text: str, width: float) -> str:
    """The text, truncated to a width."""
    count = int(width / (CHARACTER * FONT_SIZE))
    return text if len(text) <= count else text[: max(1, count - 1)] + "…"


def legend(entries: Mapping[str, str], x: float, y: float, width: float) -> tuple[list[Shape], float]:
    """A colored square and a name per entry, on as many lines as needed.

    Args:
        entries: Name -> role.

    Returns:
        The shapes, and their total height.
    """
    shapes: list[Shape] = []
    across, down = 0.0, 0.0
    for name, role in entries.items():
        shown = fitted(name, width - 18)
        needed = 18 + text_width(shown) + 14
        if across and across + needed - 14 > width:
            across, down = 0.0, down + 20
        shapes += [Rect(x + across, y + down, 12, 12, role), Label(x + across + 18, y + down + 11, shown)]
        across += needed
    return shapes, down + 20


def _frame(title: str, names: Sequence[str], height: float, x_label: str) -> tuple[Drawing, dict[str, str]]:
    """A plot with its frame, the label of its x axis and a legend below."""
    roles = {name: SERIES[i % len(SERIES)] for i, name in enumerate(names)}
    keys, taken = legend(roles, LEFT, TOP + height + 48, PLOT_WIDTH)
    drawing = Drawing(title, LEFT + PLOT_WIDTH + 30, TOP + height + 52 + taken, keys)
    drawing.shapes.append(Rect(LEFT, TOP, PLOT_WIDTH, height, "line", filled=False))
    drawing.shapes.append(Label(LEFT + PLOT_WIDTH / 2, TOP + height + 38, x_label, "soft", "middle"))
    return drawing, roles


def _y_axis(drawing: Drawing, height: float, label: str) -> None:
    """Ticks from 0 to 1 with grid lines."""
    for tick in (0, 0.5, 1.0):
        y = TOP + (1 - tick) * height
        drawing.shapes.append(Path(((LEFT, y), (LEFT + PLOT_WIDTH, y)), "line"))
        drawing.shapes.append(Label(LEFT - 8, y + 4, f"{tick:g}", "soft", "end"))
    drawing.shapes.append(Label(18, TOP + height / 2, label, "soft", "middle", vertical=True))


def recovery_drawing(
    verdicts: Sequence[Verdict], title: str = "Share of the original's knowledge that came back"
) -> Drawing | None:
    """A bar with interval for each attack with a verdict; colors show the access that the attacker needs."""
    judged = [v for v in verdicts if v.recovered is not None]
    if not judged:
        return None
    left, width, step = 12, 440, 36  # narrow, with the names above the bars, for phones
    scale = width - left - 52
    roles = {access: role for access, role in ACCESS_ROLES.items() if any(v.access == access for v in judged)}
    shapes, taken = legend(roles, left, 8, width - 2 * left)
    top = 8 + taken + 8
    bottom = top + step * len(judged)
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        x = left + tick * scale
        shapes.append(Path(((x, top - 4), (x, bottom + 2)), "line"))
        shapes.append(Label(x, bottom + 18, f"{tick:.0%}", "soft", "middle" if tick else "start"))
    for i, v in enumerate(judged):
        y, share = top + step * i, v.recovered or 0.0
        shapes.append(Label(left, y + 12, fitted(v.attack, width - 2 * left)))
        shapes.append(Rect(left, y + 17, max(1.0, share * scale), 13, ACCESS_ROLES.get(v.access, "bar")))
        end = left + share * scale
        if v.interval is not None:
            low, high = (left + bound * scale for bound in v.interval)
            shapes.append(Path(((low, y + 23.5), (high, y + 23.5)), "ink"))
            end = max(end, high)
        shapes.append(Label(end + 6, y + 28, f"{share:.0%}"))
    return Drawing(title, width, bottom + 26, shapes)


def trade_off_drawing(measurements: Mapping[str, Sequence[Measurement]]) -> Drawing | None:
    """Forgetting on the x axis, retention on the y axis: the best corner is the upper right."""
    points = {}
    for model, values in measurements.items():
        named = {m.name: m.value for m in values}
        if {"forget answer_probability", "retain answer_probability"} <= set(named):
            points[model] = (1.0 - named["forget answer_probability"], named["retain answer_probability"])
    if not points:
        return None
    height = 240.0
    drawing, roles = _frame("Forgetting versus retention", list(points), height, "forgotten: 1 - answer probability")
    _y_axis(drawing, height, "retained: answer probability")
    for tick in (0, 0.5, 1.0):
        drawing.shapes.append(Label(LEFT + tick * PLOT_WIDTH, TOP + height + 18, f"{tick:g}", "soft", "middle"))
    for i, (model, (x, y)) in enumerate(points.items()):  # later dots are smaller, so that they do not hide others
        center = LEFT + x * PLOT_WIDTH, TOP + (1 - y) * height
        drawing.shapes.append(Dot(*center, max(3.0, 9.0 - 2 * i), roles[model]))
    return drawing


def distribution_drawing(ratios: Mapping[str, Sequence[float]]) -> Drawing | None:
    """Cumulative distribution of each model's truth ratios, which forget quality compares, on a logarithmic axis."""
    logs = {}
    for model, own in ratios.items():
        known = np.asarray([math.nan if value is None else value for value in own], dtype=np.float64)
        known = known[np.isfinite(known)]
        if len(known):
            logs[model] = np.sort(np.log10(np.clip(known, 1e-6, 1e6)))
    if not logs:
        return None
    low = min(*(v[0] for v in logs.values()), -0.5)
    high = max(*(v[-1] for v in logs.values()), 0.5)
    height = 220.0
    drawing, roles = _frame(
        "Distribution of truth ratios", list(logs), height, "truth ratio (wrong over correct answers)"
    )
    _y_axis(drawing, height, "share of examples below")

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * PLOT_WIDTH

    drawing.shapes.append(Path(((across(0), TOP), (across(0), TOP + height)), "line"))
    powers = range(math.ceil(low), math.floor(high) + 1)
    labels = {power: f"{10.0**power:g}" for power in powers}
    room = max(text_width(text) for text in labels.values()) + 8
    every = max(1, math.ceil(room / (PLOT_WIDTH / (high - low))))
    for power in (p for p in powers if p % every == 0):
        drawing.shapes.append(Label(across(power), TOP + height + 18, labels[power], "soft", "middle"))
    for model, values in logs.items():
        points, level = [], 0.0
        for j, value in enumerate(values):
            points.append((across(value), TOP + (1 - level) * height))
            level = (j + 1) / len(values)
            points.append((across(value), TOP + (1 - level) * height))
        drawing.shapes.append(Path(tuple(points), roles[model], 2.0))
    return drawing


def probe_drawing(probes: Mapping[str, Sequence[float]]) -> Drawing | None:
    """Share of unseen rows that a linear probe ranks below the forgotten ones, by layer; .5 if they look unseen."""
    layers = max((len(values) for values in probes.values()), default=0)
    if layers < 2:
        return None
    height = 200.0
    drawing, roles = _frame("Probe of the hidden states", list(probes), height, "layer (0: the embedding)")
    _y_axis(drawing, height, "unseen rows below")
    for layer in range(0, layers, max(1, layers // 8)):
        x = LEFT + layer / (layers - 1) * PLOT_WIDTH
        drawing.shapes.append(Label(x, TOP + height + 18, str(layer), "soft", "middle"))
    for model, values in probes.items():
        points = [(LEFT + i / (layers - 1) * PLOT_WIDTH, TOP + (1 - value) * height) for i, value in enumerate(values)]
        drawing.shapes.append(Path(tuple(points), roles[model], 2.0))
    return drawing


def drawings_of(
    verdicts: Sequence[Verdict],
    measurements: Mapping[str, Sequence[Measurement]],
    truth_ratios: Mapping[str, Sequence[float]],
    probes: Mapping[str, Sequence[float]],
) -> dict[str, Drawing]:
    """All charts that have data, by file name."""
    membership = [v for v in verdicts if v.access == "membership"]
    drawn = {
        "recovery": recovery_drawing([v for v in verdicts if v.access != "membership"]),
        "membership": recovery_drawing(membership, "How much of the original's membership signal is left"),
        "trade_off": trade_off_drawing(measurements),
        "truth_ratios": distribution_drawing(truth_ratios),
        "probes": probe_drawing(probes),
    }
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}
