"""Forgetting against utility at each evaluation of an unlearning run, as the recipe's settings say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.unlearning_curve import UnlearningCurve, spaced, truth_ratios
from hf_transfer_ext.models.generation import GenerationSettings
from hf_transfer_ext.recipes.run import load_named
from hf_transfer_ext.recipes.training import TrainingRun
from hf_transfer_ext.registry import unknown_name

#: Options of `curve`.
CURVE = ("limit", "forget_metrics", "utility_metrics", "max_new_tokens", "retrained")


def curve_of(run: TrainingRun, job: Any, splits: Mapping[str, Any], tokenizer: Any, template: Any) -> list[Any]:
    """The callbacks that measure forgetting and utility at each evaluation; none where `eval_strategy` is "no".

    Raises:
        ValueError: `curve` without `eval_strategy`, or with an option that it does not have.
    """
    options = dict(job.curve)
    for name in options:
        if name not in CURVE:
            raise ValueError(unknown_name("option of `curve`", name, CURVE))
    if run.args.eval_strategy == IntervalStrategy.NO:
        if options:
            raise ValueError("`curve` is measured at each evaluation: set `eval_strategy` and `eval_steps` too.")
        return []
    options = {"limit": 64, "retrained": job.retrained_dir, **options}
    options["generation"] = GenerationSettings(options.pop("max_new_tokens", 48))
    rows, other = spaced(splits["forget"], options["limit"]), options.pop("retrained")
    asked = "retrained" in job.curve
    if other is not None and (asked or all(row.get("perturbed_answer") for row in rows)):
        model, own = load_named(
            other, run.record if asked else None, "retrained", dtype=job.dtype, device=run.args.device
        )
        result = evaluate(model, own, rows, ["truth_ratio"], template=template, batch_size=32, resamples=0)
        options["retrained"] = truth_ratios(result)
    return [UnlearningCurve(splits, tokenizer, template=template, batch_size=32, **options)]
