"""The plots of an audit as PNG, for a card or a paper; the report draws its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hf_transfer_ext.evals.audit.run import Audit
from hf_transfer_ext.measurement import Measurement

HAS_PLOTS = find_spec("matplotlib") is not None

_ACCESS_COLOURS = {"prompts": "#2f6fb2", "weights": "#b7791f", "fine-tuning": "#c0392b", "membership": "#5b6675"}


@contextmanager
def _figure(path: Path, width: float, height: float) -> Any:
    """Axes to draw on; the file is there when the block is done, and whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(width, height))
    try:
        yield axis
        axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.stem}.partial-{os.getpid()}.png")
        figure.savefig(aside, dpi=130)
        os.replace(aside, path)
    finally:
        pyplot.close(figure)


def recovery_plot(path: str | Path, audit: Audit) -> Path:
    """A bar for each attack that could be judged, with its 95 % interval, the worst on top."""
    judged = [v for v in audit.verdicts if v.recovered is not None]
    with _figure(Path(path), 7.5, 1.2 + 0.27 * len(judged)) as axis:
        shares = np.array([v.recovered or 0.0 for v in judged])
        places = np.arange(len(judged))
        axis.barh(places, shares, color=[_ACCESS_COLOURS.get(v.access, "#2f6fb2") for v in judged], height=0.7)
        for place, v in zip(places, judged, strict=True):
            high = v.recovered or 0.0
            if v.interval is not None:
                axis.plot(v.interval, [place, place], color="black", linewidth=1)
                high = max(high, v.interval[1])
            axis.annotate(
                f"{v.recovered:.0%}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.set_yticks(places, [v.attack for v in judged], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.08)
        axis.set_xlabel(
            "share of the original's knowledge that came back (bars: 95 % intervals over examples)", fontsize=8
        )
        for access in dict.fromkeys(v.access for v in judged):
            axis.barh([0], [0], color=_ACCESS_COLOURS.get(access, "#2f6fb2"), label=access)
        if len(judged):
            axis.legend(title="attacker needs", fontsize=7, title_fontsize=7, loc="lower right")
    return Path(path)


def trade_off_plot(path: str | Path, measured: Mapping[str, Sequence[Measurement]]) -> Path | None:
    """Forgetting to the right, keeping upwards; None where answer probabilities were not measured."""
    points = {}
    for model, values in measured.items():
        found = {m.name: m.value for m in values}
        if {"forget answer_probability", "retain answer_probability"} <= set(found):
            points[model] = (1 - found["forget answer_probability"], found["retain answer_probability"])
    if not points:
        return None
    with _figure(Path(path), 5.2, 3.8) as axis:
        for model, (x, y) in points.items():
            axis.scatter([x], [y], s=50)
            side = -8 if x > 0.6 else 8
            axis.annotate(
                model, (x, y), (side, 5), textcoords="offset points", ha="right" if x > 0.6 else "left", fontsize=9
            )
        axis.set_xlim(-0.03, 1.03)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("forgotten: 1 - answer probability on the forget set")
        axis.set_ylabel("kept: answer probability")
    return Path(path)


def truth_ratio_plot(path: str | Path, ratios: Mapping[str, Sequence[float]]) -> Path | None:
    """Cumulative distribution of each model's truth ratios; None without any."""
    kept = {model: np.sort(np.asarray(values, dtype=np.float64)) for model, values in ratios.items()}
    kept = {model: values[np.isfinite(values)] for model, values in kept.items()}
    if not any(len(values) for values in kept.values()):
        return None
    with _figure(Path(path), 5.6, 3.6) as axis:
        for model, values in kept.items():
            if len(values):
                axis.step(
                    np.clip(values, 1e-6, 1e6),
                    np.arange(1, len(values) + 1) / len(values),
                    "-",
                    where="post",
                    label=model,
                )
        axis.set_xscale("log")
        axis.axvline(1.0, color="grey", linewidth=0.8)
        axis.set_xlabel("truth ratio (wrong over right)")
        axis.set_ylabel("share of examples below")
        axis.legend(fontsize=8)
    return Path(path)


def probe_plot(path: str | Path, probes: Mapping[str, Sequence[float]]) -> Path | None:
    """What a linear probe of the hidden states recognises, layer by layer; None where it was not run."""
    if not probes:
        return None
    with _figure(Path(path), 5.6, 3.4) as axis:
        for model, values in probes.items():
            axis.plot(range(len(values)), values, marker="o", markersize=3, label=model)
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("layer (0: the embedding)")
        axis.set_ylabel("share of unseen rows put below", fontsize=9)
        axis.legend(fontsize=8)
    return Path(path)


def save_plots(
    folder: str | Path,
    audit: Audit,
    measured: Mapping[str, Sequence[Measurement]],
    truth_ratios: Mapping[str, Sequence[float]],
) -> list[Path]:
    """Write every plot for which there is something to draw, and return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not HAS_PLOTS:
        raise ImportError("The plots need matplotlib: pip install 'hf_transfer_ext[demo]'")
    folder = Path(folder)
    drawn = [
        recovery_plot(folder / "recovery.png", audit)
        if any(v.recovered is not None for v in audit.verdicts)
        else None,
        trade_off_plot(folder / "trade_off.png", measured),
        truth_ratio_plot(folder / "truth_ratios.png", truth_ratios),
        probe_plot(folder / "probes.png", audit.probes),
    ]
    return [path for path in drawn if path is not None]
