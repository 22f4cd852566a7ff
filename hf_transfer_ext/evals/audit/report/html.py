"""Write the results of an audit as one self-contained HTML file; all text from models is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from hf_transfer_ext.evals.audit.attack import ACCESS
from hf_transfer_ext.evals.audit.report.drawings import FONT_SIZE, drawings_of
from hf_transfer_ext.evals.audit.report.png import HAS_MATPLOTLIB, save_pngs
from hf_transfer_ext.evals.audit.run import Audit
from hf_transfer_ext.evals.audit.subject import AuditData
from hf_transfer_ext.evals.audit.verdict import Verdict
from hf_transfer_ext.files import write_text
from hf_transfer_ext.hub.card import CLEAN_SHARE as CLEAN
from hf_transfer_ext.measurement import Measurement

FOLDER = Path(__file__).parent

#: Packages whose versions the report lists.
PACKAGES = ("hf_transfer_ext", "torch", "transformers", "peft")

Measurements = Mapping[str, Sequence[Measurement]]
#: Parts of a cell: its text, and smaller lines below.
Cell = tuple[str, ...]


@cache
def _environment() -> Environment:
    """A template environment with autoescaping."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["breakable"] = _breakable
    return environment


def audit_report(
    path: str | Path,
    audit: Audit,
    *,
    measurements: Measurements | None = None,
    truth_ratios: Mapping[str, Sequence[float]] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, str] | None = None,
    title: str = "Unlearning audit",
) -> Path:
    """Create the HTML report.

    Args:
        measurements: Model -> its measurements; `forget answer_probability` and `retain answer_probability` are shown
            in the trade-off chart.
        truth_ratios: Model -> truth ratio of each forget example, for the chart of their distributions.
        examples: One row per forget example: texts and numbers by column; all of it is escaped.
        about: Entries below the title, such as model, unlearning method and data. "date" and "versions" override
            today's date and the installed versions.
    """
    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    recovery = [v for v in audit.verdicts if v.access != "membership"]
    text = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=title,
            about=_with_date_and_versions(about),
            headline=headline(audit),
            drawings=drawings_of(audit.verdicts, measurements or {}, truth_ratios or {}, audit.probes),
            verdict_head=["attack", "needs", "recovered", "95 % interval", "unlearned", "original", "floor", "note"],
            verdict_numeric=[2, 3, 4, 5, 6],
            recovery_rows=[_verdict_row(v) for v in recovery],
            membership_rows=[_verdict_row(v) for v in audit.verdicts if v.access == "membership"],
            membership=_measurement_table(audit.membership),
            weights=_measurement_table({"unlearned": audit.weights} if audit.weights else {}),
            measurements=_measurement_table(measurements or {}),
            examples=_example_table(examples),
            font_size=FONT_SIZE,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
        )
    )
    write_text(path, text + "\n")
    return Path(path)


def headline(audit: Audit) -> dict[str, Any]:
    """The verdict in words: "clean" only if every bar and interval supports it, "leaks" if much was recovered."""
    lines = []
    for access, what in (*ACCESS.items(), ("membership", "only tell what was trained on")):
        most = audit.worst_with(access)
        if most is not None and most.recovered is not None:
            by = f"{_interval(most.interval)} by {most.attack}"
            lines.append((f"who can {what}: ", f"{most.recovered:.0%}", by))
    worst, telling = audit.worst, audit.worst_with("membership")
    if worst is None or worst.recovered is None:
        sentence = "No attack could be judged. See the table for the reasons."
        return {"kind": "", "sentence": sentence, "worst": "", "worst_note": "", "lines": lines}
    share = Markup("<b>{}</b>").format(f"{worst.recovered:.0%}")
    came_back = Markup("At worst, {} of what the original knew came back{}:").format(share, _interval(worst.interval))
    highest = max(v.interval[1] if v.interval else v.recovered or 0.0 for v in audit.verdicts if _judged(v))
    note = "."
    if worst.recovered < CLEAN <= highest:
        note = f". The intervals do not rule out {highest:.0%}."
    if worst.recovered < CLEAN and telling is not None and (telling.recovered or 0.0) >= CLEAN:
        note += " The forget set can still be told from unseen rows."
    unjudged = sum(v.recovered is None for v in audit.verdicts)
    if unjudged:
        note += f" {unjudged} of {len(audit.verdicts)} attacks could not be judged."
    clean = highest < CLEAN and (telling is None or (telling.recovered or 0.0) < CLEAN)
    kind = "clean" if clean else "leaks" if worst.recovered >= CLEAN else ""
    return {"kind": kind, "sentence": came_back, "worst": worst.attack, "worst_note": note, "lines": lines}


def _judged(v: Verdict) -> bool:
    return v.recovered is not None and v.access != "membership"


def _with_date_and_versions(about: Mapping[str, str] | None) -> dict[str, str]:
    """The entries of `about`, with today's date and the installed versions as defaults."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    added = {"date": date.today().isoformat(), "versions": ", ".join(versions)}
    return {**dict(about or {}), **{key: value for key, value in added.items() if key not in (about or {})}}


def save_audit(
    folder: str | Path,
    audit: Audit,
    data: AuditData,
    *,
    measurements: Measurements | None = None,
    truth_ratios: Mapping[str, Sequence[float]] | None = None,
    generations: Mapping[str, Sequence[str]] | None = None,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html`, `audit.json`, `examples.jsonl` (each forget example with its score under every attack),
    `model_index.yaml` (rows for a model card) and, if matplotlib is installed, the charts as PNG.

    Args:
        generations: Model -> its answer to each forget question.
        about: As in `audit_report`; also saved in `audit.json`.

    Returns:
        The path of the report.
    """
    folder = Path(folder)
    examples: list[dict[str, Any]] = []
    for place, row in enumerate(data.forget):
        scores = {name: _finite(values[place]) for name, values in audit.scores.items()}
        written = {f"{name} writes": answers[place] for name, answers in (generations or {}).items()}
        texts = {name: row[name] for name in ("question", "answer", "text") if row.get(name) is not None}
        examples.append({**texts, **written, **scores})
    about = _with_date_and_versions(about)
    summary = {
        "about": about,
        "verdicts": [v.to_dict() for v in audit.verdicts],
        "membership": {name: [m.to_dict() for m in values] for name, values in audit.membership.items()},
        "probes": audit.probes,
        "weights": [m.to_dict() for m in audit.weights],
        "measured": {name: [m.to_dict() for m in values] for name, values in (measurements or {}).items()},
        "truth_ratios": {name: [_finite(v) for v in values] for name, values in (truth_ratios or {}).items()},
    }
    write_text(folder / "audit.json", json.dumps(summary, indent=2) + "\n")
    write_text(folder / "examples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples))
    write_text(folder / "model_index.yaml", model_index(audit))
    if HAS_MATPLOTLIB:
        save_pngs(folder, drawings_of(audit.verdicts, measurements or {}, truth_ratios or {}, audit.probes))
    return audit_report(
        folder / "report.html",
        audit,
        measurements=measurements,
        truth_ratios=truth_ratios,
        examples=examples,
        about=about,
    )


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


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95 % interval {interval[0]:.0%} to {interval[1]:.0%})"


def _number(value: float | None, spec: str = ".3f") -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, spec)


def _breakable(text: Any) -> Markup:
    """Escaped text that may wrap after `_`, `(` and `=` in a narrow column."""
    return Markup(re.sub(r"(?<=\w)([_(=])(?=\w)", r"\1<wbr>", str(escape(text))))


def _verdict_row(v: Verdict) -> list[Cell]:
    return [
        (v.attack, v.explanation),
        (v.access,),
        ("–" if v.recovered is None else f"{v.recovered:.0%}",),
        ("–" if v.interval is None else f"{v.interval[0]:.0%} – {v.interval[1]:.0%}",),
        (_number(v.unlearned),),
        (_number(v.original),),
        (_number(v.floor), v.floor_from),
        (v.note,),
    ]


def _measurement_table(measurements: Measurements) -> dict[str, Any]:
    """One row per metric, one column per model."""
    found = {model: {m.name: m for m in values} for model, values in measurements.items()}
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows: list[list[Cell]] = []
    for name in names:
        own = {model: values.get(name) for model, values in found.items()}
        m = next(one for one in own.values() if one is not None)
        unit = f"{m.unit}, {'higher' if m.higher_is_better else 'lower'} is better, {m.examples} examples"
        rows.append([(name, unit), *(_value_and_interval(one) for one in own.values())])
    return {"head": ["metric", *found], "rows": rows, "numeric": list(range(1, len(found) + 1))}


def _value_and_interval(m: Measurement | None) -> Cell:
    if m is None:
        return ("–",)
    return (f"{m.value:.4g}", "" if m.interval is None else f"{m.interval[0]:.3g} – {m.interval[1]:.3g}")


def _example_table(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in examples for key in row))
    numeric = [
        i for i, c in enumerate(columns) if all(isinstance(row.get(c), (int, float, type(None))) for row in examples)
    ]
    rows = [[(_shown(row.get(column)),) for column in columns] for row in examples]
    return {"head": columns, "rows": rows, "numeric": numeric}


def _shown(value: Any) -> str:
    return _number(value, ".4g") if isinstance(value, float) else "" if value is None else str(value)
