"""What every training logs beside its losses: tokens per second; and the plot of what was logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from hf_transfer_ext.hub.table import save_figure
from hf_transfer_ext.progress import announce
from hf_transfer_ext.registry import unknown_name

logger = logging.getLogger(__name__)

#: File of the plot, in the folder of a result.
TRAINING_PLOT = "training.png"
#: The same for forgetting against utility, where a training measured them.
CURVE_PLOT = "unlearning_curve.png"
#: Values of a log line that are not losses: schedules, counts and speeds.
_NOT_LOSSES = (
    "epoch", "step", "learning_rate", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens",
    "num_input_tokens_seen", "total_flos", "tokens_per_second", "rollout_tokens", "rollout_ended",
)  # fmt: skip
#: What evaluations log about themselves.
_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


class LogsSpeed:
    """Mixin for `Trainer` subclasses: each training log line has `tokens_per_second`, of all processes together.

    Counted are the tokens that the model is given, prompts included and padding left out, since the last log line. The
    time is that of training: data loading and checkpoints are in it, evaluations are not.
    """

    args: Any
    accelerator: Any
    state: Any
    _tokens_given: Any = 0.0
    _since: float | None = None
    _evaluates = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self._since is None:
            first = self.state.global_step
            title = f"training with {type(self).__name__}"
            announce(title, self.state.max_steps, "step", done=first, show=not self.args.disable_tqdm)
            self._since = time.perf_counter()
        self._tokens_given = self._tokens_given + tokens_in(inputs)
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._tokens_given, self._since = 0.0, None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self._evaluates:  # one of several evaluation sets: the call for all of them takes the time
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        began, self._evaluates = time.perf_counter(), True
        try:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._evaluates = False
            if self._since is not None:
                self._since += time.perf_counter() - began

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._since is not None:
            given = torch.as_tensor(self._tokens_given, dtype=torch.float32, device=self.args.device)
            tokens = float(self.accelerator.gather(given[None]).sum())
            now = time.perf_counter()
            logs["tokens_per_second"] = round(tokens / max(now - self._since, 1e-9), 1)
            self._tokens_given, self._since = 0.0, now
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class RunningSums:
    """Sums of what a trainer notes batch by batch, for training and evaluation apart, until a log line takes them."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}

    def add(self, model: nn.Module, values: Mapping[str, Tensor | float], device: Any) -> None:
        """Add the sums of tensors, or numbers, to those of the mode that the model is in."""
        noted = self.sums["train" if model.training else "eval"]
        for name, value in values.items():
            found = value.detach().float().sum() if isinstance(value, Tensor) else torch.tensor(float(value))
            noted[name] = noted.get(name, torch.zeros((), device=device)) + found.to(device)

    def take(self, mode: str, accelerator: Any) -> dict[str, float]:
        """The sums over all processes since they were last taken; the processes have to call this together."""
        noted, self.sums[mode] = self.sums[mode], {}
        if not noted:
            return {}
        names = sorted(noted)
        gathered = accelerator.gather(torch.stack([noted[name] for name in names])[None]).sum(0).tolist()
        return dict(zip(names, gathered, strict=True))


def tokens_in(batch: Mapping[str, Any]) -> Tensor | int:
    """The tokens of a batch without padding; of nested batches (a forget and a retain part), of all together."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor):
        return mask.sum()
    if isinstance(ids, Tensor):  # packed without padding
        return ids.numel()
    parts = [tokens_in(part) for part in batch.values() if isinstance(part, Mapping)]
    return sum(parts[1:], parts[0]) if parts else 0


def require_reporters(report_to: str | Sequence[str] | None) -> None:
    """Refuse places to report to that are unknown, or whose package is not installed, before anything is loaded.

    Raises:
        ValueError: An unknown name.
        ImportError: A package is missing.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name not in ("none", "all")]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(unknown_name("name in `report_to`", name, [*INTEGRATION_TO_CALLBACK, "none"]))
    if names:
        installed = get_available_reporting_integrations()
        missing = [name for name in names if name not in installed and name != "flyte"]  # which lists itself nowhere
        if missing:
            raise ImportError(
                f"`report_to` names {' and '.join(missing)}, which is not installed: `pip install "
                f"{' '.join(missing)}`, or choose among {', '.join(installed) or 'none'}. Without it, losses are in "
                "`trainer.state.log_history` and in trainer_state.json of each checkpoint."
            )


def training_plot(history: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write a PNG with one panel for each part of the loss: training as a line, evaluation as dots.

    Args:
        history: `trainer.state.log_history`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are not two lines with a loss.
    """
    panels = logged_parts(history)
    if len(panels.get("loss", {}).get("train", [])) < 2:
        raise ValueError("A plot needs at least two logged losses. Lower `logging_steps`, or train for longer.")
    pyplot = _pyplot()
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.5 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, lines) in zip(axes.flat, panels.items(), strict=False):
        for kind, points in lines.items():
            style = {"linewidth": 1.2} if kind == "train" else {"marker": "o", "markersize": 4, "linestyle": "--"}
            axis.plot(*zip(*points, strict=True), label=kind, **style)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(fontsize=7, frameon=False)
    return save_figure(figure, path)


def curve_plot(history: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write a PNG of what an `UnlearningCurve` measured: forgetting and utility over steps and against each other.

    Args:
        history: `trainer.state.log_history`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Forgetting and utility were not measured at two steps at least.
    """
    points = [line for line in measured_points(history) if "eval_utility" in line]
    if len(points) < 2:
        raise ValueError("A curve needs two evaluations at least. Lower `eval_steps`, or set `eval_on_start`.")
    pyplot = _pyplot()
    figure, (over_steps, against) = pyplot.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    steps, forgotten, utility = ([line[key] for line in points] for key in ("step", "eval_forgotten", "eval_utility"))
    for label, values in (("forgotten", forgotten), ("utility", utility)):
        over_steps.plot(steps, values, label=label, marker="o", markersize=4, linewidth=1.2)
    against.plot(utility, forgotten, marker="o", markersize=4, linewidth=1.2)
    for line in points:
        place = (line["eval_utility"], line["eval_forgotten"])
        against.annotate(f"step {line['step']}", place, (4, 3), textcoords="offset points", fontsize=7)
    over_steps.set_xlabel("step", fontsize=8)
    over_steps.legend(fontsize=7, frameon=False)
    over_steps.set_xticks(steps)
    against.margins(x=0.15)
    against.set_xlabel("utility (higher is better)", fontsize=8)
    against.set_ylabel("forgotten (higher is better)", fontsize=8)
    for axis in (over_steps, against):
        axis.set_ylim(-0.03, 1.05)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def measured_points(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The log lines of evaluations with an `UnlearningCurve`, the last one of each step, in order."""
    lines = [dict(line) for line in history if "eval_forgotten" in line]
    return list({line["step"]: line for line in lines}.values())


def curve_notes(history: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Heading -> a sentence for each evaluation with an `UnlearningCurve`, for a card; empty if there was none."""
    sentences = []
    for line in measured_points(history):
        names = [name for name in line if name.startswith("eval_") and name not in _TIMES and _is_number(line[name])]
        names.sort(key=lambda name: name not in ("eval_forgotten", "eval_utility", "eval_balance"))
        values = ", ".join(f"{name.removeprefix('eval_').replace('_', ' ')} {line[name]:.4g}" for name in names)
        sentences.append(f"Step {line['step']}: {values}.")
    return {"Forgetting against utility": sentences} if sentences else {}


def drawn(history: Iterable[Mapping[str, Any]], folder: str | Path) -> dict[str, Path]:
    """`training_plot` and `curve_plot` in a folder, as {name: file}.

    Left out is what too little was logged for; without matplotlib, all.
    """
    found, lines = {}, list(history)
    for name, plot in ((TRAINING_PLOT, training_plot), (CURVE_PLOT, curve_plot)):
        try:
            found[name] = plot(lines, Path(folder) / name)
        except ImportError as error:  # a plot is not worth the loss of the run
            logger.warning("No plot of the training was drawn: %s", error)
            break
        except ValueError:
            pass
    return found


def plot_in(folder: str | Path) -> dict[str, Path]:
    """The plot that `drawn` left in a folder, as {name: file}; empty where it left none."""
    path = Path(folder) / TRAINING_PLOT
    return {TRAINING_PLOT: path} if path.is_file() else {}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: pip install 'hf_transfer_ext[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def logged_parts(history: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Part of the loss -> {"train" or "eval" (or the evaluation set's name): [(step, value), ...]}, loss first."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}}
    lines = list(history)
    trained = {name for line in lines if "loss" in line for name in line} - set(_NOT_LOSSES)
    for line in lines:
        for name, value in line.items():
            kind, part = "train", name
            if name.startswith("eval_"):
                part = max((p for p in trained if name.endswith(f"_{p}")), key=len, default="")
                kind = name.removesuffix(f"_{part}").replace("_", " ")
            if part in trained and (kind != "train" or "loss" in line) and isinstance(value, (int, float)):
                found.setdefault(part, {}).setdefault(kind, []).append((int(line.get("step", 0)), float(value)))
    return {part: lines for part, lines in found.items() if lines}
