"""The drawings of a report as SVG, in the colours of its style sheet: text in them is escaped, nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from hf_transfer_ext.evals.audit.run import Verdict
from hf_transfer_ext.measurement import Measurement

COLOURS = ("var(--bar)", "var(--bad)", "var(--good)", "var(--third)", "var(--soft)")

#: A colour for what an attacker needs.
ACCESS_COLOURS = {
    "prompts": "var(--bar)",
    "weights": "var(--third)",
    "fine-tuning": "var(--bad)",
    "membership": "var(--soft)",
}


def svg(width: int, height: int, body: str, label: str, kind: str = "chart") -> str:
    return (
        f'<div class="scroll"><svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}" font-size="13" font-family="system-ui, sans-serif">{body}</svg></div>'
    )


def recovery_svg(verdicts: Sequence[Verdict]) -> str:
    """A bar for each attack that could be judged, with its interval; colours say what the attacker needs."""
    judged = [v for v in verdicts if v.recovered is not None]
    if not judged:
        return '<p class="soft">No attack could be judged.</p>'
    left, width, step, top = 12, 440, 36, 36  # narrow, with the names above the bars: for a phone
    scale = width - left - 52
    bottom = top + step * len(judged)
    body = []
    needs = [name for name in ACCESS_COLOURS if any(v.access == name for v in judged)]
    for i, name in enumerate(needs):
        start = left + i * 104
        body.append(f'<rect x="{start}" y="8" width="12" height="12" fill="{ACCESS_COLOURS[name]}"/>')
        body.append(f'<text class="soft" x="{start + 17}" y="18">{escape(name)}</text>')
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        x = left + tick * scale
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{bottom + 2}" stroke="var(--line)"/>')
        body.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:.0%}</text>')
    for i, v in enumerate(judged):
        y = top + step * i
        share = v.recovered or 0.0
        name = v.attack if len(v.attack) <= 56 else v.attack[:55] + "…"
        colour = ACCESS_COLOURS.get(v.access, COLOURS[0])
        body.append(f'<text x="{left}" y="{y + 12}">{escape(name)}</text>')
        body.append(
            f'<rect x="{left}" y="{y + 17}" width="{max(1.0, share * scale):.1f}" height="13" fill="{colour}"/>'
        )
        end = left + share * scale
        if v.interval is not None:
            low, high = (left + bound * scale for bound in v.interval)
            body.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 23.5}" y2="{y + 23.5}" stroke="var(--ink)"/>')
            end = max(end, high)
        body.append(f'<text x="{end + 6:.1f}" y="{y + 28}">{share:.0%}</text>')
    return svg(width, bottom + 26, "".join(body), "Share of the original's knowledge that came back", kind="bars")


def value_of(values: Sequence[Measurement], name: str) -> float | None:
    return next((m.value for m in values if m.name == name), None)


def trade_off_svg(measured: Mapping[str, Sequence[Measurement]]) -> str:
    """Forgetting to the right, keeping upwards: the best corner is the upper right."""
    points = []
    for model, values in measured.items():
        forget, retain = (value_of(values, f"{split} answer_probability") for split in ("forget", "retain"))
        if forget is not None and retain is not None:
            points.append((model, 1.0 - forget, retain))
    if not points:
        return ""
    left, top, size_x, size_y = 60, 16, 340, 240
    body = [f'<rect x="{left}" y="{top}" width="{size_x}" height="{size_y}" fill="none" stroke="var(--line)"/>']
    for tick in (0, 0.5, 1.0):
        x, y = left + tick * size_x, top + (1 - tick) * size_y
        body.append(f'<text class="soft" x="{x}" y="{top + size_y + 18}" text-anchor="middle">{tick:g}</text>')
        body.append(f'<text class="soft" x="{left - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for i, (model, x, y) in enumerate(points):
        cx, cy = left + x * size_x, top + (1 - y) * size_y
        colour = COLOURS[i % len(COLOURS)]
        anchor = "end" if x > 0.6 else "start"
        shift = -10 if anchor == "end" else 10
        body.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="6" fill="{colour}"/>')
        body.append(f'<text x="{cx + shift:.1f}" y="{cy + 4:.1f}" text-anchor="{anchor}">{escape(model)}</text>')
    middle = left + size_x / 2
    body.append(f'<text class="soft" x="{middle}" y="{top + size_y + 38}" text-anchor="middle">forgotten: 1 - answer '
                "probability on the forget set</text>")  # fmt: skip
    body.append(f'<text class="soft" transform="translate(16 {top + size_y / 2}) rotate(-90)" text-anchor="middle">'
                "kept: answer probability</text>")  # fmt: skip
    return svg(left + size_x + 30, top + size_y + 48, "".join(body), "Forgetting against keeping")


def distribution_svg(ratios: Mapping[str, Sequence[float]]) -> str:
    """Cumulative distribution of each model's truth ratios, on a logarithmic axis: what forget quality compares."""
    logs = {}
    for model, own in ratios.items():
        known = np.asarray([math.nan if value is None else value for value in own], dtype=np.float64)
        known = known[np.isfinite(known)]
        if len(known):
            logs[model] = np.sort(np.log10(np.clip(known, 1e-6, 1e6)))
    if not logs:
        return ""
    low, high = min(v[0] for v in logs.values()), max(v[-1] for v in logs.values())
    low, high = min(low, -0.5), max(high, 0.5)
    left, top, size_x, size_y = 60, 16, 340, 220
    body = [f'<rect x="{left}" y="{top}" width="{size_x}" height="{size_y}" fill="none" stroke="var(--line)"/>']
    one = left + (0 - low) / (high - low) * size_x
    body.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{top}" y2="{top + size_y}" stroke="var(--line)"/>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        x = left + (power - low) / (high - low) * size_x
        body.append(
            f'<text class="soft" x="{x:.1f}" y="{top + size_y + 18}" text-anchor="middle">{10.0**power:g}</text>'
        )
    for i, (model, values) in enumerate(logs.items()):
        colour = COLOURS[i % len(COLOURS)]
        points, level = [], 0.0
        for j, value in enumerate(values):
            x = left + (value - low) / (high - low) * size_x
            points.append(f"{x:.1f},{top + (1 - level) * size_y:.1f}")
            level = (j + 1) / len(values)
            points.append(f"{x:.1f},{top + (1 - level) * size_y:.1f}")
        body.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = top + 18 + 18 * i
        body.append(f'<rect x="{left + 10}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        body.append(f'<text x="{left + 28}" y="{y}">{escape(model)}</text>')
    body.append(f'<text class="soft" x="{left + size_x / 2}" y="{top + size_y + 38}" text-anchor="middle">'
                "truth ratio; share of examples below it</text>")  # fmt: skip
    return svg(left + size_x + 30, top + size_y + 48, "".join(body), "Distribution of truth ratios")


def probe_svg(probes: Mapping[str, Sequence[float]]) -> str:
    """Layer by layer, how many unseen rows a linear probe puts below the forgotten ones; .5 where they look unseen."""
    layers = max((len(values) for values in probes.values()), default=0)
    if layers < 2:
        return ""
    left, top, size_x, size_y = 60, 16, 340, 200
    body = [f'<rect x="{left}" y="{top}" width="{size_x}" height="{size_y}" fill="none" stroke="var(--line)"/>']
    for tick in (0, 0.5, 1.0):
        y = top + (1 - tick) * size_y
        body.append(f'<line x1="{left}" x2="{left + size_x}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        body.append(f'<text class="soft" x="{left - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for layer in range(0, layers, max(1, layers // 8)):
        x = left + layer / (layers - 1) * size_x
        body.append(f'<text class="soft" x="{x:.1f}" y="{top + size_y + 18}" text-anchor="middle">{layer}</text>')
    for i, (model, values) in enumerate(probes.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = " ".join(
            f"{left + layer / (layers - 1) * size_x:.1f},{top + (1 - value) * size_y:.1f}"
            for layer, value in enumerate(values)
        )
        body.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body.append(f'<rect x="{left + 112 * i}" y="{top + size_y + 48}" width="12" height="12" fill="{colour}"/>')
        body.append(f'<text x="{left + 28 + 140 * i}" y="{top + size_y + 58}">{escape(model)}</text>')
    body.append(f'<text class="soft" x="{left + size_x / 2}" y="{top + size_y + 38}" text-anchor="middle">'
                "layer (0: the embedding)</text>")  # fmt: skip
    return svg(left + size_x + 30, top + size_y + 68, "".join(body), "What a probe of the hidden states recognises")
