"""Evaluate a model: every forward pass and every generation is computed once and shared by all metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine.cache import ScoreCache, digest, model_fingerprint
from hf_transfer_ext.evals.engine.examples import Prepared, needs_of_columns, prepare
from hf_transfer_ext.evals.engine.result import EvaluationResult
from hf_transfer_ext.evals.engine.work import Work
from hf_transfer_ext.evals.metric import Metric, Values, summarize
from hf_transfer_ext.evals.metrics import METRICS
from hf_transfer_ext.evals.options import check_options, name_and_options, options_of
from hf_transfer_ext.measurement.bootstrap import resampled
from hf_transfer_ext.models.generation import GenerationSettings
from hf_transfer_ext.models.plumbing import active_adapter, evaluation_mode, pad_token_id
from hf_transfer_ext.models.scoring import ScoredExample, Scorer

MetricSpec = str | Mapping[str, Any] | tuple[str | Metric, Mapping[str, Any]]


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Iterable[Mapping[str, Any]],
    metrics: Sequence[MetricSpec],
    *,
    reference: Any = None,
    adapter: str | None = None,
    template: QuestionAnswerFormat | None = None,
    columns: Mapping[str, str] | None = None,
    generation: GenerationSettings | None = None,
    batch_size: int = 16,
    accelerator: Any = None,
    cache: str | Path | None = None,
    dataset: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> EvaluationResult:
    """Score every example once and compute all metrics from the scores.

    Args:
        examples: Dictionaries with "text", or with "question" and "answer" and, if a metric needs them,
            "paraphrased_answer" and "perturbed_answer" (a list): the TOFU schema.
        metrics: Names, or names with options: `["perplexity", {"truth_ratio": {"definition": "geometric"}}]`.
        reference: For metrics that compare: another model, or an adapter name of `model` ("base": without adapter).
        adapter: Adapter of `model` to evaluate, "base" for its base model; None for the active one.
        template: How to format questions as prompts; by default with the chat template, if the tokenizer has one.
        columns: Schema name -> column name in the data: `{"question": "prompt"}`.
        batch_size: Sequences per forward pass; it affects the results only by rounding.
        accelerator: An `accelerate.Accelerator`: its processes share the work, and each gets the full result.
        cache: Folder to cache scores in, so that an interrupted run resumes and a repeated one costs nothing.
        dataset: Name of the data in the measurements.
        resamples: Bootstrap resamples of each interval; 0 for none.

    Raises:
        ValueError: Unknown metric, no example, an example without a column that a metric needs (with its index),
            an answer without tokens, a sequence longer than the model supports: all before the first forward pass.
            Also if the logits are NaN while generating.
    """
    chosen = resolve_metrics(metrics, reference)
    model = accelerator.unwrap_model(model) if accelerator is not None else model
    prepared = prepare(
        model, tokenizer, examples, [metric for metric, _ in chosen], template=template, columns=columns,
        generation=generation,
    )  # fmt: skip
    return evaluate_prepared(
        model, tokenizer, prepared, chosen, reference=reference, adapter=adapter, batch_size=batch_size,
        accelerator=accelerator, cache=cache, dataset=dataset, resamples=resamples, seed=seed, progress=progress,
    )  # fmt: skip


def evaluate_prepared(
    model: Any,
    tokenizer: Any,
    prepared: Prepared,
    metrics: Sequence[MetricSpec],
    *,
    reference: Any = None,
    adapter: str | None = None,
    batch_size: int = 16,
    accelerator: Any = None,
    cache: str | Path | None = None,
    dataset: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> EvaluationResult:
    """Like `evaluate`, with examples that were prepared for these metrics."""
    chosen = resolve_metrics(metrics, reference)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    model = accelerator.unwrap_model(model) if accelerator is not None else model
    needs = frozenset[str]().union(*(metric.needs for metric, _ in chosen))
    reference = reference if "reference" in needs else None
    fingerprint = ""
    if cache is not None:
        parts = [model_fingerprint(model, adapter)]
        if reference is not None:
            named = isinstance(reference, str)
            parts.append(model_fingerprint(model if named else reference, reference if named else None))
        fingerprint = digest(parts)
    store = ScoreCache(cache, fingerprint, accelerator.process_index if accelerator is not None else 0)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # every process must read the same files before any of them writes
    scorer = Scorer(model, reference=reference, adapter=adapter, pad_id=pad_token_id(tokenizer))
    work = Work(scorer, store, batch_size=batch_size, accelerator=accelerator, progress=progress)
    examples = prepared.examples
    with evaluation_mode(model, None if isinstance(reference, str) else reference):
        wanted = needs_of_columns([metric for metric, _ in chosen])
        if wanted:
            work.score(examples, wanted)
        if "generations" in needs:
            with active_adapter(model, adapter):
                work.generate(examples, prepared.prompts, tokenizer, prepared.generation)
    result = compute_metrics(examples, chosen, dataset=dataset, resamples=resamples, seed=seed, cost=work.total_cost())
    empty = [e.index for e in examples if e.generation is not None and not e.generation.strip()]
    if empty:
        result.problems.append(
            f"The model generated nothing for {len(empty)} of {len(examples)} examples (first: example {empty[0]}); "
            "the empty generations are scored like any others."
        )
    return result


def resolve_metrics(metrics: Sequence[Any], reference: Any = None) -> list[tuple[Metric, dict[str, Any]]]:
    """Every metric with its options, checked before any work.

    Raises:
        ValueError: No metric, an unknown one, or one that needs a reference if there is none.
    """
    chosen = [resolve_metric(spec) for spec in metrics]
    if not chosen:
        raise ValueError(f"`metrics` is empty. Available: {', '.join(sorted(METRICS))}.")
    comparing = [metric.__name__ for metric, _ in chosen if "reference" in metric.needs]
    if comparing and reference is None:
        raise ValueError(
            f"{', '.join(comparing)} compare with a reference: pass a model or adapter name as `reference=`."
        )
    return chosen


def resolve_metric(spec: Any) -> tuple[Metric, dict[str, Any]]:
    """`"perplexity"`, `{"truth_ratio": {...}}` or `("truth_ratio", {...})` -> the metric and its options.

    Raises:
        ValueError: `spec` has another form, the metric is unknown, or it does not have the option.
    """
    name, options = name_and_options("metric", spec)
    metric = name if isinstance(name, Metric) else METRICS[name]
    check_options("metric", metric.__name__, options, options_of(metric.per_example))
    return metric, options


def compute_metrics(
    scored: Sequence[ScoredExample],
    metrics: Sequence[MetricSpec],
    *,
    dataset: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    cost: dict[str, int] | None = None,
) -> EvaluationResult:
    """Compute metrics from examples that are already scored: a new metric then needs no forward pass."""
    measurements, all_values, problems = [], {}, []
    for spec in metrics:
        metric, options = resolve_metric(spec)
        label = metric.label(options)
        values, weights, left_out = values_of(scored, metric, options)
        problems += [f"{label} leaves example {index} out: {reason}" for index, reason in left_out.items()]
        all_values[label] = values
        kept = ~np.isnan(values)
        if not kept.any():
            problems.append(f"{label} could not be measured: every example was left out.")
            continue
        measurements.append(
            summarize(
                metric, values[kept], weights[kept], options=options, dataset=dataset, resamples=resamples, seed=seed
            )
        )
    return EvaluationResult(measurements, list(scored), all_values, problems, cost or {})


def values_of(
    scored: Sequence[ScoredExample], metric: Metric, options: Mapping[str, Any]
) -> tuple[Values, Values, dict[int, str]]:
    """Value and weight of each example (NaN if it is left out), and why examples were left out, by index."""
    values, weights = np.full(len(scored), np.nan), np.ones(len(scored))
    left_out: dict[int, str] = {}
    for place, example in enumerate(scored):
        try:
            refuse_nan_scores(example, metric)
            value, weight = as_value_and_weight(metric(example, **options))
        except Exception as error:  # an error in one example must not lose the others
            left_out[example.index] = (
                str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            )
            continue
        if np.isfinite(value):
            values[place], weights[place] = value, weight
        else:
            left_out[example.index] = "its value is not finite."
    return values, weights, left_out


def as_value_and_weight(value: Any) -> tuple[float, float]:
    """Normalize what a metric returns for an example: a number, or a number and its weight.

    Raises:
        ValueError: Anything else.
    """
    pair = value if isinstance(value, tuple) else (value, 1.0)
    if len(pair) != 2 or not all(np.ndim(part) == 0 and np.isreal(part) for part in pair):
        raise ValueError(f"a metric returns a number, or a number and its weight; this one returned {value!r}.")
    return float(pair[0]), float(pair[1])


def refuse_nan_scores(example: ScoredExample, metric: Metric) -> None:
    """Refuse NaN log-probabilities, even if a metric would return a number for them (a NaN is never a first choice).

    Raises:
        ValueError: With the number of such tokens.
    """
    for column in metric.texts if metric.needs - {"generations"} else ():
        for scores in example.texts.get(column, ()):
            for name, known in (("model", scores.log_probs), ("reference", scores.reference_log_probs)):
                if known is not None and np.isnan(known).any() and (name == "model" or "reference" in metric.needs):
                    raise ValueError(
                        f"the {name}'s log-probabilities are NaN at {np.isnan(known).sum()} of {len(known)} tokens."
                    )


def resampled_summaries(
    scored: Sequence[ScoredExample], metrics: Sequence[MetricSpec], *, resamples: int = 1000, seed: int = 0
) -> Float[np.ndarray, "metrics resamples"]:
    """Summaries of several metrics on examples drawn with replacement, with the same draws for all metrics."""
    rows = []
    for spec in metrics:
        metric, options = resolve_metric(spec)
        values, weights, _ = values_of(scored, metric, options)
        summary = metric.summary_for(**options) if metric.summary_for else metric.summary

        def of_known(drawn: Values, weight: Values, summary: Any = summary) -> float:
            kept = ~np.isnan(drawn)
            return summary(drawn[kept], weight[kept]) if kept.any() else float("nan")

        rows.append(resampled(of_known, [[values, weights]], resamples=resamples, seed=seed))
    return np.stack(rows)
