"""Measure models: `accelerate launch recipes/evaluate.py --config recipes/configs/evaluate/demo.yaml`.

One pass over each data set for all metrics; several adapters of one base side by side; a second run is free where
`cache` names a folder. Writes the measurements, every example, a table and a plot.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_transfer_ext.data.fictitious_people import fictitious_people
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.evals.engine import GenerationSettings, evaluate, resolve_metric
from hf_transfer_ext.evals.models import with_adapters
from hf_transfer_ext.evals.table import comparison_plot, comparison_table
from hf_transfer_ext.files import write_text
from hf_transfer_ext.loading import load_model, load_tokenizer
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
    data: list[str] = field(
        default_factory=lambda: ["fictitious_people"], metadata={"help": "Files, folders or Hub ids."}
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
    cache: str | None = field(default=None, metadata={"help": "Folder that keeps scores by content."})
    seed: int = 0


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (arguments,) = parse_recipe(EvaluateArguments, argv=argv)
    accelerator = Accelerator()
    text = arguments.metrics.strip()
    metrics = json.loads(text) if text.startswith("[") else [name.strip() for name in text.split(",")]
    for spec in metrics:
        resolve_metric(spec)  # a typo is told before a model is loaded
    sets = {}
    for name in arguments.data:
        if name == "fictitious_people":
            sets |= fictitious_people(20, seed=arguments.seed)
        else:
            sets[Path(name).stem] = load_rows(name, split=arguments.split, config_name=arguments.data_config)
    if arguments.adapters and len(arguments.models) > 1:
        raise ValueError("`adapters` go on one model: give one in `models`.")
    shared = {
        "template": QuestionAnswerFormat(template=arguments.template, prompt=arguments.prompt),
        "columns": json.loads(arguments.columns),
        "batch_size": arguments.batch_size,
        "generation": GenerationSettings(arguments.max_new_tokens),
        "accelerator": accelerator,
        "cache": arguments.cache,
        "seed": arguments.seed,
        "progress": True,
    }
    reference = arguments.reference
    if reference not in (None, "base"):
        reference = load_model(reference, dtype=arguments.dtype).to(accelerator.device)
    compared: dict[str, list[Any]] = {}
    for name in arguments.models:
        path = demo_model() if name == "demo" else name
        model, tokenizer = load_model(path, dtype=arguments.dtype).to(accelerator.device), load_tokenizer(path)
        variants: Any = {Path(name).name: None}
        if arguments.adapters:
            model, variants = with_adapters(model, arguments.adapters)
        for variant, adapter in variants.items():
            compared[variant] = []
            for dataset, rows in sets.items():
                result = evaluate(
                    model, tokenizer, rows[: arguments.limit], metrics,
                    reference=reference, adapter=adapter, dataset=dataset, **shared,
                )  # fmt: skip
                compared[variant] += [replace(m, name=f"{dataset} {m.name}") for m in result.measurements]
                if accelerator.is_main_process:
                    result.save(Path(arguments.output_dir) / variant / dataset)
                    print("\n".join(result.problems))
    if accelerator.is_main_process:
        table = comparison_table(compared)
        print(table)
        write_text(Path(arguments.output_dir) / "table.txt", table + "\n")
        comparison_plot(compared, Path(arguments.output_dir) / "measurements.png", title="Evaluation")
    return compared


if __name__ == "__main__":
    main()
