"""Measure models: `accelerate launch recipes/evaluate.py --config recipes/configs/evaluate/demo.yaml`.

One pass over each data set for all metrics, or a whole suite by its name (`--suite tofu`); several adapters of one
base side by side; a second run is free where `cache` names a folder. Writes the measurements, every example, a table
and a plot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.evals.engine.evaluate import GenerationSettings, evaluate, resolve_metric
from hf_transfer_ext.evals.harness import measure_with_lm_eval
from hf_transfer_ext.evals.models import with_adapters
from hf_transfer_ext.evals.suite_run import SuiteRun
from hf_transfer_ext.evals.suites import SUITES
from hf_transfer_ext.evals.table import comparison_plot, comparison_table
from hf_transfer_ext.files import write_text
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import parse_recipe
from hf_transfer_ext.teachers.demo import demo_model


@dataclass
class EvaluateArguments:
    """What is measured on what."""

    output_dir: str = field(default="runs/evaluate", metadata={"help": "Folder of the results."})
    models: list[str] = field(
        default_factory=lambda: ["demo"],
        metadata={"help": "Folders or Hub ids, or demo (Gemma 3 270M). Adapters are loaded onto their base."},
    )
    adapters: list[str] | None = field(
        default=None, metadata={"help": "Adapter folders, all put on the one model; it is measured as base too."}
    )
    reference: str | None = field(default=None, metadata={"help": "Model for metrics that compare, or base."})
    dtype: str = "float32"
    suite: str | None = field(default=None, metadata={"help": f"One of {', '.join(SUITES)}, in place of metrics."})
    suite_options: str = field(default="{}", metadata={"help": 'JSON for it or its loader: {"split": "forget05"}.'})
    compared_with: str | None = field(
        default=None, metadata={"help": "A suite's other model: retrained (tofu, muse) or before unlearning."}
    )
    lm_eval_tasks: str | None = field(default=None, metadata={"help": "Tasks of lm-evaluation-harness besides."})
    lm_eval_folder: str | None = field(default=None, metadata={"help": "Folder of own tasks in YAML."})
    data: list[str] | None = field(
        default=None, metadata={"help": "Files, folders or Hub ids (default: made-up people, or the suite's own)."}
    )
    split: str = "train"
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    columns: str = field(default="{}", metadata={"help": "JSON: schema name -> your column."})
    limit: int | None = field(default=None, metadata={"help": "Only the first rows of each data set."})
    metrics: str = field(
        default="perplexity, answer_probability, truth_ratio, exact_memorization, extraction_strength",
        metadata={"help": 'Names, comma-separated, or JSON: ["perplexity", {"truth_ratio": {...}}].'},
    )
    template: str = field(default="auto", metadata={"help": "auto, chat or plain."})
    prompt: str = field(default=QuestionAnswerFormat.prompt, metadata={"help": "The plain prompt."})
    max_new_tokens: int = 200
    batch_size: int = 16
    per_example: str = field(default="jsonl", metadata={"help": "Every example as jsonl or parquet."})
    cache: str | None = field(default=None, metadata={"help": "Folder that keeps scores by content."})
    seed: int = 0


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (arguments,) = parse_recipe(EvaluateArguments, argv=argv)
    if arguments.per_example not in ("jsonl", "parquet"):
        raise ValueError(f"`per_example` has to be jsonl or parquet, got {arguments.per_example!r}.")
    if arguments.adapters and len(arguments.models) > 1:
        raise ValueError("`adapters` go on one model: give one in `models`.")
    accelerator = Accelerator()
    template = QuestionAnswerFormat(template=arguments.template, prompt=arguments.prompt)
    shared: dict[str, Any] = {
        "template": template, "columns": json.loads(arguments.columns), "batch_size": arguments.batch_size,
        "generation": GenerationSettings(arguments.max_new_tokens), "accelerator": accelerator,
        "cache": arguments.cache, "seed": arguments.seed, "progress": True,
    }  # fmt: skip
    run, first = None, arguments.compared_with
    if arguments.suite:
        run = SuiteRun(
            arguments.suite, (arguments.data or [None])[0], comparing=first is not None, limit=arguments.limit,
            suite_options=json.loads(arguments.suite_options), **shared,
        )  # fmt: skip
        measure: Any = run.measured
    elif first:
        raise ValueError("`compared_with` is for suites: give one in `suite`, or a `reference` for metrics.")
    else:
        measure = metrics_measured(arguments, shared)
    compared: dict[str, list[Any]] = {}
    for name in [first, *arguments.models] if first else arguments.models:
        path = demo_model() if name == "demo" else name
        model, tokenizer = load_model(path, dtype=arguments.dtype).to(accelerator.device), load_tokenizer(path)
        title = run.role if run and run.role and not compared else Path(name).name
        title = str(name).strip("/").replace("/", "_") if title in compared else title  # two runs may end in one name
        variants: Any = {title: None}
        if arguments.adapters and name != first:
            model, variants = with_adapters(model, arguments.adapters)
        for variant, adapter in variants.items():
            compared[variant] = []
            for place, result in measure(model, tokenizer, variant, adapter):
                compared[variant] += result.measurements
                if accelerator.is_main_process:
                    result.save(Path(arguments.output_dir) / place, per_example=arguments.per_example)
                    print("\n".join(result.problems))
            if arguments.lm_eval_tasks:
                compared[variant] += measure_with_lm_eval(
                    model, tokenizer, arguments.lm_eval_tasks.replace(",", " ").split(), adapter=adapter,
                    task_folder=arguments.lm_eval_folder, limit=arguments.limit, batch_size=arguments.batch_size,
                )  # fmt: skip
    if run:
        told, problems = run.together()
        compared |= {"in order": told} if told else {}
        print("\n".join(problems))
    if accelerator.is_main_process:
        table = comparison_table(compared)
        print(table)
        write_text(Path(arguments.output_dir) / "table.txt", table + "\n")
        comparison_plot(compared, Path(arguments.output_dir) / "measurements.png", title="Evaluation")
    return compared


def metrics_measured(arguments: EvaluateArguments, shared: dict[str, Any]) -> Any:
    """How a model is measured by metrics: `(model, tokenizer, title, adapter)` -> place and result of each set."""
    text = arguments.metrics.strip()
    metrics = json.loads(text) if text.startswith("[") else [name.strip() for name in text.split(",")]
    for spec in metrics:
        resolve_metric(spec)  # a typo is told before a model is loaded
    sets: dict[str, Any] = {}
    for name in arguments.data or ["fictitious_people"]:
        if name == "fictitious_people":
            sets |= fictitious_people(20, seed=arguments.seed)
        else:
            sets[Path(name).stem] = load_rows(name, split=arguments.split, config_name=arguments.data_config)
    reference: Any = arguments.reference
    if reference not in (None, "base"):
        reference = load_model(reference, dtype=arguments.dtype).to(shared["accelerator"].device)

    def measure(model: Any, tokenizer: Any, title: str, adapter: str | None) -> Iterator[tuple[str, Any]]:
        for dataset, rows in sets.items():
            options = {**shared, "reference": reference, "adapter": adapter, "dataset": dataset}
            result = evaluate(model, tokenizer, rows[: arguments.limit], metrics, **options)
            result.measurements = [replace(m, name=f"{dataset} {m.name}") for m in result.measurements]
            yield f"{title}/{dataset}", result

    return measure


if __name__ == "__main__":
    main()
