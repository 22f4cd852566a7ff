"""Forgetting against utility while a model unlearns: measured at each evaluation of `UnlearningTrainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from hf_transfer_ext.evals.engine.evaluate import evaluate, evaluate_prepared, resolve_metric, resolve_metrics
from hf_transfer_ext.evals.engine.examples import Prepared, prepare
from hf_transfer_ext.evals.engine.result import EvaluationResult
from hf_transfer_ext.evals.metrics.forget_quality import forget_quality
from hf_transfer_ext.evals.metrics.model_utility import harmonic_mean
from hf_transfer_ext.models.plumbing import gathered_weights, is_sharded
from hf_transfer_ext.trainers.measured import MeasuredInTraining

Rows = Sequence[Mapping[str, Any]]

#: Shares of what a model still knows, which `forgotten` and `utility` summarize; other metrics are logged only.
KNOWLEDGE = (
    "answer_probability", "choice_probability", "choice_accuracy", "rouge_l_recall", "exact_memorization",
    "extraction_strength", "verbatim_memorization", "knowledge_memorization",
)  # fmt: skip
FORGET_METRICS = ("answer_probability", "extraction_strength", "rouge_l_recall")
UTILITY_METRICS = ("answer_probability", "rouge_l_recall")

#: Logged for a p-value of 0, whose logarithm would not be a number in JSON.
LEAST_LOG10 = -324.0


class UnlearningCurve(MeasuredInTraining):
    """Measures how much is forgotten and what is kept, at each evaluation of an `UnlearningTrainer`.

    Logged are, for every set and metric, `eval_SET_METRIC` (`eval_forget_answer_probability`), and the summaries

    - `eval_forgotten`: harmonic mean of 1 - each share of knowledge (`KNOWLEDGE`) of the forget sets, in [0, 1];
    - `eval_utility`: harmonic mean of these shares on all other sets, in [0, 1];
    - `eval_balance`: harmonic mean of the two, one number for `metric_for_best_model`;
    - `eval_forget_quality` and its decimal logarithm `eval_forget_quality_log10` (at least -324), with `retrained`.

    Every process gets the same numbers: the rows are shared out, so they are those of one process. Of a model that is
    sharded by FSDP2, answers are scored in place, one sequence in each pass; metrics that generate text gather its
    weights on each process for the evaluation. ZeRO-3 takes metrics that only score answers.

    Example:
        curve = UnlearningCurve({"forget": forget, "retain": retain}, tokenizer, limit=64)
        args = UnlearningConfig("out", eval_strategy="steps", eval_steps=20)
        trainer = UnlearningTrainer(model, args, forget_dataset=forget, retain_dataset=retain, callbacks=[curve])

    Args:
        splits: Name -> rows in the schema of `evaluate`. "forget" is required; it and names that begin with "forget_"
            are what has to be forgotten, all others (retain, holdout, ...) are to be kept. Empty ones are left out.
        tokenizer: The tokenizer of the trained model.
        forget_metrics: Metrics on the sets to forget, as in `evaluate`; at least one of `KNOWLEDGE`.
        utility_metrics: Metrics on the sets to keep; at least one of `KNOWLEDGE` if there is such a set.
        retrained: A model that never saw the forget set, or its truth ratios of the rows in `rows["forget"]`, to test
            whether the two can be told apart. The rows then need wrong answers (`perturbed_answer`).
        limit: At most so many rows of each set, evenly spaced; None for all.
        options: Passed to `evaluate` (`template`, `columns`, `generation`, `batch_size`, `reference`, ...).

    Raises:
        ValueError: An unknown metric, two with one name, no rows to forget, or rows that cannot be measured; before
            the first step.
    """

    def __init__(
        self,
        splits: Mapping[str, Rows],
        tokenizer: Any,
        *,
        forget_metrics: Sequence[Any] = FORGET_METRICS,
        utility_metrics: Sequence[Any] = UTILITY_METRICS,
        retrained: Any = None,
        limit: int | None = None,
        **options: Any,
    ) -> None:
        if not splits.get("forget"):
            raise ValueError("The set 'forget' is missing or empty: there is nothing whose forgetting to measure.")
        if limit is not None and limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {limit}.")
        self.tokenizer, self.retrained, self.options = tokenizer, retrained, options
        #: The rows that are measured.
        self.rows = {name: spaced(rows, limit) for name, rows in splits.items() if len(rows)}
        reference = options.get("reference")
        self.metrics = {
            name: resolve_metrics(forget_metrics if _forgets(name) else utility_metrics, reference)
            for name in self.rows
        }
        self.directions = self._directions()
        if retrained is not None:
            ratio = resolve_metric("truth_ratio")
            if all(metric.__name__ != "truth_ratio" for metric, _ in self.metrics["forget"]):
                self.metrics["forget"] = [*self.metrics["forget"], ratio]
            self.directions |= {"forget_quality": True, "forget_quality_log10": True}
        self._prepared: dict[str, Prepared] = {}

    def prepare(self, model: Any, accelerator: Any) -> None:
        if is_sharded(accelerator=accelerator):
            self._check_sharded(accelerator)
        shared = {key: self.options.get(key) for key in ("template", "columns", "generation")}
        for name, rows in self.rows.items():
            metrics = [metric for metric, _ in self.metrics[name]]
            try:
                self._prepared[name] = prepare(model, self.tokenizer, rows, metrics, **shared)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"The set {name!r} cannot be measured during training: {error}") from error

    def _needing(self, need: str) -> list[str]:
        """Names of the metrics that need this."""
        return sorted({metric.__name__ for own in self.metrics.values() for metric, _ in own if need in metric.needs})

    def _check_sharded(self, accelerator: Any) -> None:
        """Refuse metrics that cannot be computed between the steps of a sharded training."""
        kind, advice = accelerator.distributed_type.value, "Choose `forget_metrics` and `utility_metrics` that only"
        if self._needing("generations") and not getattr(accelerator, "is_fsdp2", False):
            raise ValueError(
                f"{', '.join(self._needing('generations'))} generate text, for which sharded weights ({kind}) are "
                f"gathered under FSDP2 alone. {advice} score answers."
            )
        if self._needing("gradients"):
            raise ValueError(
                f"{', '.join(self._needing('gradients'))} take gradients of single sequences, of which each process "
                f"would have its shard alone ({kind}). {advice} need forward passes."
            )

    def measure(self, model: Any, accelerator: Any) -> dict[str, float]:
        with gathered_weights(model, accelerator=accelerator) if self._needing("generations") else nullcontext():
            return self._measured(model, accelerator)

    def _measured(self, model: Any, accelerator: Any) -> dict[str, float]:
        if not self._prepared:
            self.prepare(model, accelerator)
        rest = {key: value for key, value in self.options.items() if key not in ("template", "columns", "generation")}
        rest |= {"accelerator": accelerator, "resamples": 0}
        found: dict[str, float] = {}
        ratios: Any = None
        for name, prepared in self._prepared.items():
            result = evaluate_prepared(model, self.tokenizer, prepared, self.metrics[name], **rest)
            values = {m.name: m.value for m in result.measurements}
            for metric, options in self.metrics[name]:
                label = metric.label(options)
                if label not in values:
                    raise ValueError(f"{label} cannot be measured on {name!r}: {'; '.join(result.problems[:2])}")
                if f"{name}_{metric.__name__}" in self.directions:
                    found[f"{name}_{metric.__name__}"] = values[label]
            if name == "forget" and self.retrained is not None:
                ratios = truth_ratios(result)
        found |= self._summaries(found)
        if ratios is not None:
            quality, log10 = forget_quality(ratios, self._reference_ratios(accelerator), resamples=0)
            found |= {"forget_quality": quality.value, "forget_quality_log10": max(log10.value, LEAST_LOG10)}
        return {name: found[name] for name in self.directions}

    def _directions(self) -> dict[str, bool]:
        """Name -> whether higher is better, of all that is logged but forget quality."""
        found: dict[str, bool] = {}
        for name, metrics in self.metrics.items():
            names = [metric.__name__ for metric, _ in metrics]
            if len(set(names)) < len(names):
                raise ValueError(f"Two metrics of {name!r} would be logged under one name: {', '.join(names)}.")
            if not set(names) & set(KNOWLEDGE):
                raise ValueError(
                    f"The metrics of {name!r} are {', '.join(names)}, none of which is a share of what is known. "
                    f"Add one of {', '.join(KNOWLEDGE)}."
                )
            for metric, _ in metrics:
                knows = _forgets(name) and metric.__name__ != "truth_ratio"
                found[f"{name}_{metric.__name__}"] = metric.higher_is_better != knows
        found["forgotten"] = True
        return found | ({"utility": True, "balance": True} if not all(map(_forgets, self.metrics)) else {})

    def _summaries(self, found: Mapping[str, float]) -> dict[str, float]:
        known = [
            (_forgets(name), found[f"{name}_{metric.__name__}"])
            for name, metrics in self.metrics.items()
            for metric, _ in metrics
            if metric.__name__ in KNOWLEDGE
        ]
        summaries = {"forgotten": harmonic_mean([1.0 - share for forgets, share in known if forgets])}
        kept = [share for forgets, share in known if not forgets]
        if kept:
            summaries["utility"] = harmonic_mean(kept)
            summaries["balance"] = harmonic_mean([summaries["forgotten"], summaries["utility"]])
        return summaries

    def _reference_ratios(self, accelerator: Any) -> np.ndarray:
        """Truth ratios of the retrained model, computed once."""
        if hasattr(self.retrained, "parameters"):
            own = {key: self.options.get(key) for key in ("template", "columns")}
            own |= {"batch_size": self.options.get("batch_size", 16), "accelerator": accelerator, "resamples": 0}
            metrics = [pair for pair in self.metrics["forget"] if pair[0].__name__ == "truth_ratio"]
            result = evaluate(self.retrained, self.tokenizer, self.rows["forget"], metrics, **own)  # type: ignore[arg-type]
            self.retrained = truth_ratios(result)
        ratios = np.asarray(self.retrained, dtype=np.float64)
        if len(ratios) != len(self.rows["forget"]):
            raise ValueError(
                f"`retrained` has {len(ratios)} truth ratios, but {len(self.rows['forget'])} rows of the forget set "
                "are measured. Compute them on the curve's `rows['forget']`."
            )
        return ratios


def _forgets(name: str) -> bool:
    return name.split("_")[0] == "forget"


def spaced(rows: Rows, limit: int | None) -> list[Mapping[str, Any]]:
    """All rows, or `limit` of them at equal distances."""
    count = len(rows) if limit is None else min(limit, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def truth_ratios(result: EvaluationResult) -> np.ndarray:
    """The truth ratio of each example."""
    return next(values for label, values in result.values.items() if label.split("(")[0] == "truth_ratio")
