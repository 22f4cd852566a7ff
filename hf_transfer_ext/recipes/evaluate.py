"""Measure models: `accelerate launch recipes/evaluate.py --config recipes/configs/evaluate/demo.yaml`.

One pass over each data set for all metrics, or a suite by its name (`--suite tofu`), adapters of a base side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.adapters import with_adapters
from hf_transfer_ext.evals.baselines import asked_with
from hf_transfer_ext.evals.harness import measure_with_lm_eval
from hf_transfer_ext.evals.metric_run import PEOPLE, USUAL, MetricRun, load_sets, resolve_all
from hf_transfer_ext.evals.metrics import METRICS
from hf_transfer_ext.evals.suite_run import SuiteRun
from hf_transfer_ext.evals.suites import SUITES
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.record import RunRecord, describe_dataset, describe_input
from hf_transfer_ext.models.generation import GenerationSettings
from hf_transfer_ext.recipe import parse_recipe, setting
from hf_transfer_ext.recipes.publishing import PublishArguments
from hf_transfer_ext.recipes.run import load_named, run_recipe, start_record
from hf_transfer_ext.settings import REQUIRED


@dataclass
class EvaluateArguments(PublishArguments):
    """Which models to measure, and on which data."""

    models: list[str] = setting(REQUIRED, "models", "Folders or Hub ids, or demo (Gemma 3 270M).")
    adapters: list[str] | None = setting(None, "models", "Adapter folders on the one model; base is measured too.")
    reference: str | None = setting(None, "models", "Model for metrics that compare, or base.")
    compared_with: str | None = setting(None, "models", "A suite's other model: retrained, or before unlearning.")
    dtype: str = setting("float32", "models", "auto, float32 or bfloat16.")
    data: list[str] | None = setting(None, "data", "Files, folders, Hub ids; none: made-up people or the suite's own.")
    split: str = setting("train", "data", "Split of each.")
    data_config: str | None = setting(None, "data", "Configuration of a Hub data set.")
    columns: dict[str, str] = setting({}, "data", "Name in the schema -> your column: {question: q, answer: a}.")
    limit: int | None = setting(None, "data", "Only the first rows of each data set.")
    template: str = setting("auto", "data", "auto, chat or plain.")
    chat_template_kwargs: dict[str, Any] = setting({}, "data", "Of the chat template: {enable_thinking: false}.")
    baseline: dict[str, Any] = setting({}, "data", "Prompt that unlearns: {in_context_unlearning: {forget_data: F}}.")
    prompt: str = setting(QuestionAnswerFormat.prompt, "data", "The plain prompt.")
    metrics: list[Any] = setting(USUAL, "metrics", f"Of {', '.join(METRICS)}; or {{name: {{option: value}}}}.")
    suite: str | None = setting(None, "metrics", f"One of {', '.join(SUITES)}, instead of metrics.")
    suite_options: dict[str, Any] = setting({}, "metrics", "Options of it or its loader: {split: forget05}.")
    lm_eval_tasks: list[str] | None = setting(None, "metrics", "Tasks of lm-evaluation-harness as well.")
    lm_eval_folder: str | None = setting(None, "metrics", "Folder of your own tasks in YAML.")
    max_new_tokens: int = setting(200, "metrics", "Longest generation.")
    batch_size: int = setting(16, "", "Examples in a forward pass.")
    cache: str | None = setting(None, "", "Folder that keeps scores by content.")
    per_example: Literal["jsonl", "parquet"] = setting("jsonl", "", "Every example as jsonl or parquet.")
    output_dir: str = setting("runs/evaluate", "", "Folder of the results.")
    seed: int = setting(0, "", "Seed of all random choices.")


def metric_run(job: EvaluateArguments, shared: dict[str, Any], record: RunRecord) -> MetricRun:
    """The data sets and the reference, loaded once for all models."""
    resolve_all(job.metrics)
    own: Any = {"split": job.split, "config_name": job.data_config, "limit": job.limit, "seed": job.seed}
    sets = load_sets(job.data or [PEOPLE], **own)
    reference: Any = job.reference
    if reference not in (None, "base"):
        reference, _ = load_named(reference, record, "reference", dtype=job.dtype, device=shared["accelerator"].device)
    return MetricRun(job.metrics, sets, reference=reference, **shared)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (job,) = parse_recipe(EvaluateArguments, argv=argv)
    publication, source = job.publication(), SUITES[job.suite].source if job.suite else None
    job.data = job.data or ([source] if source else None)
    accelerator, out, first = Accelerator(), Path(job.output_dir), job.compared_with
    record = start_record("evaluation", __file__, argv, job, seed=job.seed)
    shared: dict[str, Any] = {name: getattr(job, name) for name in ("columns", "batch_size", "cache", "seed")}
    form = QuestionAnswerFormat(job.template, job.prompt, chat_template_kwargs=job.chat_template_kwargs)
    shared["template"] = asked_with(job.baseline, form, record, suite=job.suite or job.lm_eval_tasks, seed=job.seed)
    shared |= {"generation": GenerationSettings(job.max_new_tokens), "accelerator": accelerator, "progress": True}
    if job.adapters and len(job.models) > 1:
        raise ValueError("`adapters` go on one model: give one in `models`.")
    if first and not job.suite:
        raise ValueError("`compared_with` is for suites: give one in `suite`, or a `reference`.")
    options: Any = {"suite_options": job.suite_options, "comparing": first is not None, "limit": job.limit}
    suite = SuiteRun(job.suite, (job.data or [None])[0], **options, **shared) if job.suite else None
    measure = (suite or metric_run(job, shared, record)).results_by_folder
    record.inputs += [describe_dataset(name) for name in job.data or [] if name != PEOPLE]
    record.inputs += [describe_input(folder, role="adapter") for folder in job.adapters or []]
    compared: dict[str, list[Any]] = {}
    for name in filter(None, [first, *job.models]):
        model, tokenizer = load_named(name, record, dtype=job.dtype, device=accelerator.device)
        title = suite.role if suite and suite.role and not compared else Path(name).name
        title = name.strip("/").replace("/", "_") if title in compared else title  # two runs may end in one name
        plain = not job.adapters or name == first
        model, variants = (model, {title: None}) if plain else with_adapters(model, job.adapters)
        for variant, adapter in variants.items():
            compared[variant] = []
            with record.stage(f"measure {variant}"):
                for place, result in measure(model, tokenizer, variant, adapter):
                    compared[variant] += result.measurements
                    if accelerator.is_main_process:
                        result.save(out / place, per_example=job.per_example)
                        print(*result.problems, sep="\n")
                if job.lm_eval_tasks:
                    tasks: Any = {"limit": job.limit, "batch_size": job.batch_size, "tasks": job.lm_eval_tasks}
                    tasks |= {"task_folder": job.lm_eval_folder, "adapter": adapter}
                    compared[variant] += measure_with_lm_eval(model, tokenizer, **tasks)
    together, problems = suite.together() if suite else ([], [])
    compared |= {"in order": together} if together else {}
    print(*problems, sep="\n", end="\n" * bool(problems))
    if accelerator.is_main_process:
        publication.publish(finish_run(out, record, compared, plot="measurements.png"))
    return compared


if __name__ == "__main__":
    run_recipe("evaluate", main)
