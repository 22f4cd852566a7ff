"""One HTML file that tells how an unlearning went: it loads nothing, runs no text of a model, and reads on a phone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.evals.audit.audit import Audit, Verdict
from hf_transfer_ext.evals.audit.subject import AuditData
from hf_transfer_ext.evals.measurement import Measurement
from hf_transfer_ext.files import write_text

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d8dee6; --page: #ffffff; --panel: #f5f7fa; --bar: #2f6fb2;
  --bad: #c0392b; --good: #2e8b57; --third: #b7791f; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #343d49; --page: #14181e;
  --panel: #1c222a; --bar: #6aa5e0; --bad: #e57368; --good: #62c08d; --third: #e0aa4f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.soft, small, caption, .soft { color: var(--soft); }
.verdict { background: var(--panel); border-left: 4px solid var(--bad); padding: .7rem 1rem; margin: 1rem 0; }
.verdict.clean { border-color: var(--good); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { min-width: 11rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; min-width: 34rem; max-width: 46rem; height: auto; background: var(--panel); }
svg text { fill: var(--ink); }
svg .soft { fill: var(--soft); } input { width: 100%; max-width: 26rem; padding: .5rem; font: inherit;
  color: inherit; background: var(--panel); border: 1px solid var(--line); border-radius: 4px; }
"""

_SCRIPT = """
var box = document.getElementById("search");
if (box) box.addEventListener("input", function () {
  var wanted = box.value.toLowerCase();
  document.querySelectorAll("#examples tbody tr").forEach(function (row) {
    row.hidden = row.textContent.toLowerCase().indexOf(wanted) < 0;
  });
});
"""

_COLOURS = ("var(--bar)", "var(--bad)", "var(--good)", "var(--third)", "var(--soft)")


def audit_report(
    path: str | Path,
    audit: Audit,
    *,
    measured: Mapping[str, Sequence[Measurement]] | None = None,
    truth_ratios: Mapping[str, Sequence[float]] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
    title: str = "Unlearning audit",
) -> Path:
    """Write the report.

    Args:
        measured: Model -> its measurements; `forget answer_probability` and `retain answer_probability` make the
            trade-off plot.
        truth_ratios: Model -> truth ratio of each forget example, for the plot of their distributions.
        examples: One row per forget example: texts and numbers by column; all of it is escaped.
    """
    parts = [f"<h1>{escape(title)}</h1>", _headline(audit)]
    parts += ["<h2>Recovery by attack</h2>", _recovery_plot(audit.verdicts), _verdict_table(audit.verdicts)]
    if audit.membership:
        parts += ["<h2>Membership inference</h2>", _measurement_table({"unlearned": audit.membership})]
        parts.append(
            '<p class="soft">0.5: forgotten and unseen examples cannot be told apart. Towards 1, the forget set still '
            "looks trained on; towards 0, it has become less likely than unseen text, which is a trace as well.</p>"
        )
    if measured:
        parts += ["<h2>Forgotten and kept</h2>", _trade_off_plot(measured), _measurement_table(measured)]
    if truth_ratios:
        parts += ["<h2>Truth ratios of the forget set</h2>", _distribution_plot(truth_ratios)]
    if examples:
        parts += ["<h2>Examples</h2>", _example_table(examples)]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    write_text(
        path,
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + f"\n<script>{_SCRIPT}</script></body></html>\n",
    )
    return Path(path)


def save_audit(
    folder: str | Path,
    audit: Audit,
    data: AuditData,
    *,
    measured: Mapping[str, Sequence[Measurement]] | None = None,
    truth_ratios: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Write `audit.json`, `examples.jsonl` (each forget example with its score under every attack) and `report.html`.

    Returns:
        The path of the report.
    """
    folder = Path(folder)
    examples: list[dict[str, Any]] = []
    for place, row in enumerate(data.forget):
        scores = {name: _finite(values[place]) for name, values in audit.scores.items()}
        examples.append({"question": row["question"], "answer": row["answer"], **scores})
    summary = {
        "verdicts": [v.to_dict() for v in audit.verdicts],
        "membership": [m.to_dict() for m in audit.membership],
        "measured": {name: [m.to_dict() for m in values] for name, values in (measured or {}).items()},
    }
    write_text(folder / "audit.json", json.dumps(summary, indent=2) + "\n")
    write_text(folder / "examples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples))
    return audit_report(folder / "report.html", audit, measured=measured, truth_ratios=truth_ratios, examples=examples)


def _finite(value: Any) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def _headline(audit: Audit) -> str:
    worst = audit.worst
    if worst is None or worst.recovered is None:
        return '<div class="verdict">No attack could be judged. The table says why.</div>'
    clean = worst.recovered < 0.1
    sentence = (
        f"At worst, <b>{worst.recovered:.0%}</b> of what the original knew came back"
        f"{_interval(worst.interval, percent=True)}: <b>{escape(worst.attack)}</b>."
    )
    return f'<div class="verdict{" clean" if clean else ""}">{sentence}</div>'


def _interval(interval: tuple[float, float] | None, *, percent: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (f"{v:.0%}" if percent else f"{v:.3g}" for v in interval)
    return f" (95 % interval {low} to {high})"


def _number(value: float | None, spec: str = ".3f") -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, spec)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int], *, identity: str = "") -> str:
    """Cells are HTML already."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f'<{tag} class="{"number" if i in numbers else "text"}">{c}</{tag}>' for i, c in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    name = f' id="{identity}"' if identity else ""
    return (
        f'<div class="scroll"><table{name}><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = [
        [
            escape(v.attack),
            "–" if v.recovered is None else f"{v.recovered:.0%}",
            "–" if v.interval is None else f"{v.interval[0]:.0%} – {v.interval[1]:.0%}",
            _number(v.unlearned),
            _number(v.original),
            _number(v.floor),
            escape(v.note),
        ]
        for v in verdicts
    ]
    head = ["attack", "recovered", "95 % interval", "unlearned", "original", "retrained", "note"]
    return _table(head, rows, {1, 2, 3, 4, 5})


def _measurement_table(measured: Mapping[str, Sequence[Measurement]]) -> str:
    rows = [
        [
            escape(model),
            escape(m.name),
            f"{m.value:.4g}",
            "–" if m.interval is None else f"{m.interval[0]:.3g} – {m.interval[1]:.3g}",
            f"{escape(m.unit)}, {'higher' if m.higher_is_better else 'lower'} is better",
            str(m.examples),
        ]
        for model, values in measured.items()
        for m in values
    ]
    return _table(["model", "metric", "value", "95 % interval", "unit", "examples"], rows, {2, 3, 5})


def _example_table(examples: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in examples for key in row))
    numeric = {
        i for i, c in enumerate(columns) if all(isinstance(row.get(c), (int, float, type(None))) for row in examples)
    }
    rows = []
    for row in examples:
        cells = []
        for column in columns:
            value = row.get(column)
            shown = _number(value, ".4g") if isinstance(value, float) else "" if value is None else str(value)
            cells.append(escape(shown))
        rows.append(cells)
    box = '<p><input id="search" type="search" placeholder="Search the examples" aria-label="Search the examples"></p>'
    return box + _table([escape(c) for c in columns], rows, numeric, identity="examples")


def _svg(width: int, height: int, body: str, label: str) -> str:
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'font-size="13" font-family="system-ui, sans-serif">{body}</svg></div>'
    )


def _recovery_plot(verdicts: Sequence[Verdict]) -> str:
    """A bar for each attack that could be judged, with its interval."""
    judged = [v for v in verdicts if v.recovered is not None]
    if not judged:
        return '<p class="soft">No attack could be judged.</p>'
    left, width, step = 250, 640, 26
    body = []
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        x = left + tick * (width - left - 60)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{step * len(judged) + 14}" stroke="var(--line)"/>')
        body.append(
            f'<text class="soft" x="{x:.1f}" y="{step * len(judged) + 30}" text-anchor="middle">{tick:.0%}</text>'
        )
    for i, v in enumerate(judged):
        y = 12 + step * i
        scale = width - left - 60
        name = v.attack if len(v.attack) <= 30 else v.attack[:29] + "…"
        body.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        length = max(1.0, (v.recovered or 0.0) * scale)
        body.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="18" fill="var(--bar)"/>')
        end = left + (v.recovered or 0.0) * scale
        if v.interval is not None:
            low, high = (left + bound * scale for bound in v.interval)
            body.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="var(--ink)"/>')
            end = max(end, high)
        body.append(f'<text x="{end + 6:.1f}" y="{y + 14}">{v.recovered:.0%}</text>')
    return _svg(width, step * len(judged) + 38, "".join(body), "Share of the original's knowledge that came back")


def _value_of(values: Sequence[Measurement], name: str) -> float | None:
    return next((m.value for m in values if m.name == name), None)


def _trade_off_plot(measured: Mapping[str, Sequence[Measurement]]) -> str:
    """Forgetting to the right, keeping upwards: the best corner is the upper right."""
    points = []
    for model, values in measured.items():
        forget, retain = (_value_of(values, f"{split} answer_probability") for split in ("forget", "retain"))
        if forget is not None and retain is not None:
            points.append((model, 1.0 - forget, retain))
    if not points:
        return ""
    left, top, size_x, size_y = 60, 16, 460, 240
    body = [f'<rect x="{left}" y="{top}" width="{size_x}" height="{size_y}" fill="none" stroke="var(--line)"/>']
    for tick in (0, 0.5, 1.0):
        x, y = left + tick * size_x, top + (1 - tick) * size_y
        body.append(f'<text class="soft" x="{x}" y="{top + size_y + 18}" text-anchor="middle">{tick:g}</text>')
        body.append(f'<text class="soft" x="{left - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for i, (model, x, y) in enumerate(points):
        cx, cy = left + x * size_x, top + (1 - y) * size_y
        colour = _COLOURS[i % len(_COLOURS)]
        anchor = "end" if x > 0.6 else "start"
        shift = -10 if anchor == "end" else 10
        body.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="6" fill="{colour}"/>')
        body.append(f'<text x="{cx + shift:.1f}" y="{cy + 4:.1f}" text-anchor="{anchor}">{escape(model)}</text>')
    middle = left + size_x / 2
    body.append(f'<text class="soft" x="{middle}" y="{top + size_y + 38}" text-anchor="middle">forgotten: 1 - answer '
                "probability on the forget set</text>")  # fmt: skip
    body.append(f'<text class="soft" transform="translate(16 {top + size_y / 2}) rotate(-90)" text-anchor="middle">'
                "kept: answer probability</text>")  # fmt: skip
    return _svg(left + size_x + 30, top + size_y + 48, "".join(body), "Forgetting against keeping")


def _distribution_plot(ratios: Mapping[str, Sequence[float]]) -> str:
    """Cumulative distribution of each model's truth ratios, on a logarithmic axis: what forget quality compares."""
    logs = {
        model: np.sort(np.log10(np.clip(np.asarray(values, dtype=np.float64), 1e-6, 1e6)))
        for model, values in ratios.items()
        if len(values)
    }
    if not logs:
        return ""
    low, high = min(v[0] for v in logs.values()), max(v[-1] for v in logs.values())
    low, high = min(low, -0.5), max(high, 0.5)
    left, top, size_x, size_y = 60, 16, 520, 220
    body = [f'<rect x="{left}" y="{top}" width="{size_x}" height="{size_y}" fill="none" stroke="var(--line)"/>']
    one = left + (0 - low) / (high - low) * size_x
    body.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{top}" y2="{top + size_y}" stroke="var(--line)"/>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        x = left + (power - low) / (high - low) * size_x
        body.append(
            f'<text class="soft" x="{x:.1f}" y="{top + size_y + 18}" text-anchor="middle">{10.0**power:g}</text>'
        )
    for i, (model, values) in enumerate(logs.items()):
        colour = _COLOURS[i % len(_COLOURS)]
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
    return _svg(left + size_x + 30, top + size_y + 48, "".join(body), "Distribution of truth ratios")
