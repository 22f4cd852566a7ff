"""The contract of a metric, for `METRICS` and for metrics of outside code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine.evaluate import compute_metrics, evaluate
from hf_transfer_ext.evals.engine.result import EvaluationResult
from hf_transfer_ext.evals.metric import QUANTITIES, SCORED_COLUMNS, Metric
from hf_transfer_ext.models.generation import GenerationSettings

#: Rows of different lengths, so that a batch of several has padding.
ROWS = [
    {
        "question": f"Where was person {i} born?",
        "answer": "In " + "Atlantis by the sea " * (i + 1),
        "paraphrased_answer": "It was Atlantis" + "." * i,
        "perturbed_answer": ["In Rome", "In Oslo it was", "Paris"],
    }
    for i in range(5)
]


def check_metric(metric: Any, **options: Any) -> None:
    """Hold a metric to what the engine, the tables and the cards rely on.

    It is computed on a tiny random model, in batches of one and of several, and on the same examples in another order.

    Args:
        metric: A `Metric`, registered or not.
        options: Options of the metric.

    Raises:
        AssertionError: Names the promise that is broken: name, unit, direction and source; needs and columns that the
            engine provides and that are all the metric reads; a finite value for each example; values that depend
            neither on the batch (padding) nor on the order of examples; no number from logits that are NaN; and an
            interval that contains the value.
    """
    name = _declaration(metric)
    model = tiny_model()
    alone, batched = (_measured(model, metric, options, batch_size) for batch_size in (1, len(ROWS)))
    for result in (alone, batched):
        assert not result.problems, f"{name} leaves out examples that have all it declares: {result.problems[0]}"
        assert len(result.measurements) == 1, f"{name} gives {len(result.measurements)} measurements, not one."
    _shapes(name, metric, options, batched)
    (ours,), (theirs,) = alone.values.values(), batched.values.values()
    assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-4), f"{name} depends on the batch: {ours} or {theirs}."
    value, padded = alone.measurements[0].value, batched.measurements[0].value
    assert math.isclose(value, padded, rel_tol=1e-3, abs_tol=1e-4), (
        f"{name} depends on the batch: {value} or {padded}."
    )
    turned = compute_metrics(batched.scored[::-1], [(metric, options)], resamples=50)
    (backwards,) = turned.values.values()
    assert np.array_equal(backwards[::-1], theirs), f"{name} depends on the order: {backwards[::-1]} or {theirs}."
    again = turned.measurements[0].value
    assert math.isclose(again, padded, rel_tol=1e-6, abs_tol=1e-9), (
        f"{name} depends on the order: {again} or {padded}."
    )
    interval = batched.measurements[0].interval
    assert interval is not None and interval[0] - 1e-9 <= padded <= interval[1] + 1e-9, (
        f"The interval {interval} of {name} does not contain its value {padded}."
    )
    _nan_is_refused(name, metric, options)


def _declaration(metric: Any) -> str:
    assert isinstance(metric, Metric), f"{metric!r} is not a `Metric`: declare it with `@metric(unit=...)`."
    name = metric.__name__
    assert name.isidentifier(), f"The name {name!r} cannot be the name of a file or an option in YAML."
    assert isinstance(metric.unit, str) and metric.unit.strip(), f"{name} has no unit."
    assert isinstance(metric.higher_is_better, bool), f"{name} has no direction: `higher_is_better` is true or false."
    source = (metric.__doc__ or "").partition("Source: ")[2]
    assert "https://" in source or "this package's own" in source or source.strip(), f"{name} has no `Source:`."
    assert metric.needs <= set(QUANTITIES), (
        f"{name} needs {sorted(metric.needs - set(QUANTITIES))}, which nobody scores."
    )
    assert set(metric.texts) <= set(SCORED_COLUMNS), (
        f"{name} reads the columns {metric.texts}, not all of which exist."
    )
    return name


def _measured(model: Any, metric: Metric, options: dict[str, Any], batch_size: int) -> EvaluationResult:
    return evaluate(
        model, byte_tokenizer(), ROWS, [(metric, options)], reference=tiny_model(1), batch_size=batch_size,
        template=QuestionAnswerFormat(template="plain"), generation=GenerationSettings(12), resamples=200,
    )  # fmt: skip


def _shapes(name: str, metric: Metric, options: dict[str, Any], result: EvaluationResult) -> None:
    for scored in result.scored:
        value = metric(scored, **options)
        numbers = value if isinstance(value, tuple) else (value, 1.0)
        good = len(numbers) == 2 and all(isinstance(n, (int, float, np.number)) and math.isfinite(n) for n in numbers)
        assert good, f"{name} has to give a finite number for an example, or a number and its weight; got {value!r}."
        assert numbers[1] > 0, f"{name} gives an example the weight {numbers[1]}; a weight is > 0."
    summary = result.measurements[0]
    assert isinstance(summary.value, float) and math.isfinite(summary.value), f"{name} sums up to {summary.value!r}."


def _nan_is_refused(name: str, metric: Metric, options: dict[str, Any]) -> None:
    """From a model whose logits are NaN there is an error or a problem, and never a number."""
    broken = tiny_model()
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(math.nan)
    try:
        result = _measured(broken, metric, options, len(ROWS))
    except ValueError as error:
        assert "NaN" in str(error), f"{name} fails on a model whose logits are NaN without saying so: {error}"
        return
    found = [m.value for m in result.measurements]
    assert not found, f"{name} gives {found} for a model whose logits are NaN."


def tiny_model(seed: int = 0) -> Any:
    """A Llama of two layers with random weights over bytes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=257,
            initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
