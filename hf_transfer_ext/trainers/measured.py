"""What is measured at each evaluation of a training beside its losses, and logged as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy


class MeasuredInTraining(TrainerCallback):
    """Measures the model at each evaluation of a trainer with `MeasuresInTraining`, such as `UnlearningTrainer`.

    Give it to the trainer among its `callbacks`. What it measures is logged as `eval_NAME`, so that reporters,
    `metric_for_best_model` and `EarlyStoppingCallback` can use it. Subclasses set `directions` and define `measure`;
    `hf_transfer_ext.evals.unlearning_curve.UnlearningCurve` is one.

    Attributes:
        directions: Name of each measured value, and whether higher is better.
    """

    directions: Mapping[str, bool]
    #: Set by the trainer that calls `measure`.
    trainer_measures = False

    def measure(self, model: Any, accelerator: Any) -> dict[str, float]:
        """The values of all names in `directions`; every process calls it and gets the same values.

        Args:
            model: The trained model without the wrappers of a distributed training.
        """
        raise NotImplementedError

    def prepare(self, model: Any, accelerator: Any) -> None:
        """Refuse a model or data that cannot be measured, before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        if not self.trainer_measures:
            raise ValueError(f"{name} is called by UnlearningTrainer; this trainer would never measure it.")
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"{name} measures at each evaluation, and `eval_strategy` is 'no'. Set it, and `eval_steps`."
            )


class NoLosses(tuple):
    """Stands for the evaluation set where nothing but `MeasuredInTraining` is evaluated."""


class MeasuresInTraining:
    """Mixin for `Trainer` subclasses: each evaluation includes the values of its `MeasuredInTraining` callbacks.

    With such a callback, `eval_strategy` needs no evaluation set; without one, no losses are evaluated.
    """

    args: Any
    accelerator: Any
    callback_handler: Any
    eval_dataset: Any
    model: Any
    _pending: Mapping[str, float] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        measuring = _measuring(kwargs.get("callbacks") or ())
        if measuring and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = NoLosses()
        super().__init__(*args, **kwargs)
        _check_best_metric(self.args, measuring, evaluates_losses=self.evaluates_losses)

    @property
    def evaluates_losses(self) -> bool:
        """Whether an evaluation has losses, and not only what callbacks measure."""
        return self.eval_dataset is not None and not isinstance(self.eval_dataset, NoLosses)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        for callback in _measuring(self.callback_handler.callbacks):
            callback.trainer_measures = True
            callback.prepare(self.accelerator.unwrap_model(self.model), self.accelerator)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        measuring = _measuring(self.callback_handler.callbacks)
        if not measuring or self._pending is not None:  # an evaluation of several sets calls this for each of them
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        model = self.accelerator.unwrap_model(self.model)
        values = [callback.measure(model, self.accelerator) for callback in measuring]
        found = {f"{metric_key_prefix}_{name}": value for own in values for name, value in own.items()}
        self._pending = found
        try:
            if eval_dataset is not None or self.evaluates_losses:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
            logs: dict[str, float] = {}
            self.log(logs)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)  # type: ignore
            return logs
        finally:
            self._pending = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._pending:
            logs.update(self._pending)  # the first line of the evaluation
            self._pending = {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _measuring(callbacks: Any) -> list[MeasuredInTraining]:
    return [callback for callback in callbacks if isinstance(callback, MeasuredInTraining)]


def _check_best_metric(args: Any, measuring: list[MeasuredInTraining], *, evaluates_losses: bool) -> None:
    """Refuse a best model by a value that is not measured, or in the wrong direction, before any step."""
    directions = {name: better for callback in measuring for name, better in callback.directions.items()}
    chosen = (args.metric_for_best_model or "").removeprefix("eval_")
    if chosen in directions and bool(args.greater_is_better) != directions[chosen]:
        better = "higher" if directions[chosen] else "lower"
        raise ValueError(
            f"`metric_for_best_model` is {chosen!r}, of which {better} is better: set `greater_is_better` to "
            f"{directions[chosen]}."
        )
    if measuring and chosen and chosen not in directions and not evaluates_losses:
        raise ValueError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r}, but there is no evaluation set, and without "
            f"one only {', '.join(directions)} are measured. Choose one of them, or give `eval_dataset`."
        )
