"""Define metrics: functions of one scored example, with a unit, a direction and the scores that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import Any

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.evals.options import label_with
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import interval_of

#: The complete list of what a metric may need, and what the engine then provides.
QUANTITIES = {
    "token_log_probs": "log p of each token, and whether it was the model's first choice",
    "vocabulary_moments": "mean and standard deviation of log p over the vocabulary, at each token",
    "reference": "log p under the reference, KL(reference || model) and equality of the first choices, at each token",
    "gradients": "norm of the gradient of the sequence's mean loss",
    "hidden_states": "every layer's hidden state at the last token of the prompt",
    "generations": "what the model writes after the prompt",
}

#: Columns whose scores a metric may use.
SCORED_COLUMNS = ("answer", "paraphrased_answer", "perturbed_answer")

Values = Float[np.ndarray, " examples"]
Summary = Callable[[Values, Values], float]


def weighted_mean(values: Values, weights: Values) -> float:
    """Weighted mean: the plain mean for equal weights, the mean over tokens if the weights are numbers of tokens."""
    return float((values * weights).sum() / weights.sum())


class Metric:
    """One value per example, and one summary for the set.

    Args:
        per_example: `(scored example, **options)` -> value, or `(value, weight)`. A `ValueError` it raises is kept
            as this example's problem; the others are still measured.
        unit: Unit of the summary.
        higher_is_better: Direction of the summary. A forget set usually needs the opposite of a retain set; metrics
            declare the direction for knowledge to keep, unless they only measure forgetting.
        needs: The `QUANTITIES` that it uses.
        texts: The `SCORED_COLUMNS` that it uses.
        summary: `(values, weights)` -> the number for the set; the weighted mean by default. It may be given as a
            function `(**options) -> summary` through `summary_for`.
        named_options: Options that are part of the measurement's name even with their default value, because the
            number cannot be interpreted without them.
    """

    __name__: str

    def __init__(
        self,
        per_example: Callable[..., Any],
        *,
        unit: str,
        higher_is_better: bool,
        needs: Sequence[str] = ("token_log_probs",),
        texts: Sequence[str] = ("answer",),
        summary: Summary = weighted_mean,
        summary_for: Callable[..., Summary] | None = None,
        named_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.per_example = per_example
        self.unit = unit
        self.higher_is_better = higher_is_better
        self.needs = frozenset(needs)
        self.texts = tuple(texts)
        self.summary = summary
        self.summary_for = summary_for
        self.named_options = dict(named_options or {})
        update_wrapper(self, per_example)
        check_declaration(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.per_example(*args, **kwargs)

    def label(self, options: Mapping[str, Any]) -> str:
        """`truth_ratio(definition=arithmetic)`: the name with every option that changes the meaning of the number."""
        return label_with(self.__name__, {**self.named_options, **options})


def check_declaration(metric: Any) -> None:
    """Refuse a metric that the engine cannot compute; called by `METRICS.register`.

    Raises:
        ValueError: Not a `Metric`, no unit or direction, or a need or column that the engine does not provide.
    """
    if not isinstance(metric, Metric):
        raise ValueError(
            f"Declare a metric with `@metric(unit=..., higher_is_better=...)` above a function of one scored "
            f"example; got {metric!r}."
        )
    name = metric.__name__
    if not isinstance(metric.unit, str) or not metric.unit.strip() or not isinstance(metric.higher_is_better, bool):
        raise ValueError(
            f"The metric {name} must declare its unit (a string) and direction (`higher_is_better`, true or false); "
            f"got {metric.unit!r} and {metric.higher_is_better!r}."
        )
    for need in metric.needs:
        if need not in QUANTITIES:
            provided = "; ".join(f"{known}: {what}" for known, what in QUANTITIES.items())
            raise ValueError(
                f"The metric {name} needs {need!r}, which the engine does not provide. It provides {provided}."
            )
    for column in metric.texts:
        if column not in SCORED_COLUMNS:
            raise ValueError(
                f"The metric {name} uses the column {column!r}; the engine only scores {', '.join(SCORED_COLUMNS)}."
            )
    if metric.texts and not metric.needs:
        raise ValueError(f"The metric {name} uses {', '.join(metric.texts)} but declares no `needs`.")


def metric(**declared: Any) -> Callable[[Callable[..., Any]], Metric]:
    """Decorator: `@metric(unit="share", higher_is_better=True)` above a function of one scored example."""
    return lambda per_example: Metric(per_example, **declared)


def summarize(
    metric: Metric,
    values: Values,
    weights: Values | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Measurement:
    """One measurement with its bootstrap interval from the values of all examples."""
    options = dict(options or {})
    weights = np.ones(len(values)) if weights is None else weights
    if len(values) == 0:
        raise ValueError(f"{metric.label(options)} could not be measured: every example was left out.")
    summary = metric.summary_for(**options) if metric.summary_for else metric.summary
    return Measurement(
        metric.label(options),
        summary(values, weights),
        metric.unit,
        metric.higher_is_better,
        len(values),
        interval=interval_of(summary, [[values, weights]], resamples=resamples, seed=seed),
        dataset=dataset,
    )
