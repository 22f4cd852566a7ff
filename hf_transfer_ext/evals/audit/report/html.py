"""One HTML file that tells how an unlearning went: it loads nothing, runs no text of a model, and reads on a phone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.evals.audit.attack import ACCESS
from hf_transfer_ext.evals.audit.report.drawings import distribution_svg, probe_svg, recovery_svg, trade_off_svg
from hf_transfer_ext.evals.audit.report.plots import HAS_PLOTS, save_plots
from hf_transfer_ext.evals.audit.run import Audit, Verdict
from hf_transfer_ext.evals.audit.subject import AuditData
from hf_transfer_ext.files import write_text
from hf_transfer_ext.measurement import Measurement

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
.verdict ul { margin: .4rem 0 0; padding-left: 1.2rem; }
td.text { overflow-wrap: break-word; } #examples td.text { min-width: 11rem; } td:last-child.text { min-width: 12rem; }
td:first-child.text { min-width: 9.5rem; } td .soft { font-size: .8rem; }
@media (max-width: 40rem) { body { padding: .8rem; font-size: 15px; } th, td { padding: .3rem .4rem; } }
svg { display: block; width: 100%; height: auto; background: var(--panel); }
svg.bars { max-width: 36rem; } svg.chart { max-width: 34rem; }
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
    parts += ["<h2>Recovery by attack</h2>", recovery_svg(audit.verdicts), _verdict_table(audit.verdicts)]
    if audit.membership:
        parts += ["<h2>Membership inference</h2>", _measurement_table(audit.membership)]
        parts.append(
            '<p class="soft">0.5: forgotten and unseen examples cannot be told apart. Towards 1, the forget set still '
            "looks trained on; towards 0, it has become less likely than unseen text, which is a trace as well.</p>"
        )
    if audit.probes:
        parts += ["<h2>What the hidden states tell</h2>", probe_svg(audit.probes)]
        parts.append(
            '<p class="soft">A linear probe is fitted to rows that were kept and rows that were never seen. Drawn is '
            "the share of unseen rows above which it puts the forgotten ones: 1 as if known, 0.5 as if unseen.</p>"
        )
    if audit.weights:
        parts += ["<h2>Distance from the original's weights</h2>", _measurement_table({"unlearned": audit.weights})]
    if measured:
        parts += ["<h2>Forgotten and kept</h2>", trade_off_svg(measured), _measurement_table(measured)]
    if truth_ratios:
        parts += ["<h2>Truth ratios of the forget set</h2>", distribution_svg(truth_ratios)]
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
    generations: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write `report.html`, `audit.json`, `examples.jsonl` (each forget example with its score under every attack),
    `model_index.yaml` (rows for a model card) and, where matplotlib is installed, its plots as PNG.

    Args:
        generations: Model -> what it writes when it is asked each forget question.

    Returns:
        The path of the report.
    """
    folder = Path(folder)
    examples: list[dict[str, Any]] = []
    for place, row in enumerate(data.forget):
        scores = {name: _finite(values[place]) for name, values in audit.scores.items()}
        written = {f"{name} writes": texts[place] for name, texts in (generations or {}).items()}
        examples.append({"question": row["question"], "answer": row["answer"], **written, **scores})
    summary = {
        "verdicts": [v.to_dict() for v in audit.verdicts],
        "membership": {name: [m.to_dict() for m in values] for name, values in audit.membership.items()},
        "probes": audit.probes,
        "weights": [m.to_dict() for m in audit.weights],
        "measured": {name: [m.to_dict() for m in values] for name, values in (measured or {}).items()},
        "truth_ratios": {name: [_finite(v) for v in values] for name, values in (truth_ratios or {}).items()},
    }
    write_text(folder / "audit.json", json.dumps(summary, indent=2) + "\n")
    write_text(folder / "examples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples))
    write_text(folder / "model_index.yaml", model_index(audit))
    if HAS_PLOTS:
        save_plots(folder, audit, measured or {}, truth_ratios or {})
    return audit_report(folder / "report.html", audit, measured=measured, truth_ratios=truth_ratios, examples=examples)


def model_index(audit: Audit) -> str:
    """The recovered shares as rows of a model card's `model-index`, in YAML."""
    import yaml

    rows = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": m.dataset, "type": "custom"},
            "metrics": [
                {
                    "type": m.name,
                    "value": m.value,
                    "name": f"{m.name} ({m.unit}, lower is better, {m.examples} examples)",
                    **({"args": {"interval_95": list(m.interval)}} if m.interval else {}),
                }
            ],
        }
        for m in audit.measurements()
    ]
    return yaml.safe_dump({"model-index": [{"name": "Unlearning audit", "results": rows}]}, sort_keys=False, width=119)


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
    others = []
    for access, what in (*ACCESS.items(), ("membership", "do no more than tell what was trained on")):
        most = audit.worst_with(access)
        if most is not None and most.recovered is not None:
            others.append(
                f"<li>who can {escape(what)}: <b>{most.recovered:.0%}</b>{_interval(most.interval, percent=True)} "
                f"by {escape(most.attack)}</li>"
            )
    return f'<div class="verdict{" clean" if clean else ""}">{sentence}<ul>{"".join(others)}</ul></div>'


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


def _breakable(name: str) -> str:
    """A long name that a narrow column may break after `_`, `(` and `=`."""
    return re.sub(r"([_(=])", r"\1<wbr>", escape(name))


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = [
        [
            _breakable(v.attack),
            escape(v.access),
            "–" if v.recovered is None else f"{v.recovered:.0%}",
            "–" if v.interval is None else f"{v.interval[0]:.0%} – {v.interval[1]:.0%}",
            _number(v.unlearned),
            _number(v.original),
            _number(v.floor),
            escape(v.note),
        ]
        for v in verdicts
    ]
    head = ["attack", "needs", "recovered", "95 % interval", "unlearned", "original", "floor", "note"]
    return _table(head, rows, {2, 3, 4, 5, 6})


def _measurement_table(measured: Mapping[str, Sequence[Measurement]]) -> str:
    """A row for each metric, a column for each model."""
    found = {model: {m.name: m for m in values} for model, values in measured.items()}
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = []
    for name in names:
        own = {model: values.get(name) for model, values in found.items()}
        m = next(one for one in own.values() if one is not None)
        unit = f"{m.unit}, {'higher' if m.higher_is_better else 'lower'} is better, {m.examples} examples"
        cells = [_measured(one) for one in own.values()]
        rows.append([f'{_breakable(name)}<br><span class="soft">{escape(unit)}</span>', *cells])
    return _table(["metric", *(escape(model) for model in found)], rows, set(range(1, len(found) + 1)))


def _measured(m: Measurement | None) -> str:
    if m is None:
        return "–"
    interval = "" if m.interval is None else f'<br><span class="soft">{m.interval[0]:.3g} – {m.interval[1]:.3g}</span>'
    return f"{m.value:.4g}{interval}"


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
