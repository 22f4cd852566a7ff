"""Merge models and measure what became of each: `python recipes/merge.py --config recipes/configs/merge/demo.yaml`.

Merges as a YAML in the grammar of mergekit says, measures all parents and the result on the same data, and puts a card
with the parents and the YAML into the result. Under `accelerate launch` the processes share the merge, and the first
one measures. `hf-transfer-ext merge` does the merge alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.evals.engine.evaluate import evaluate, resolve_metric
from hf_transfer_ext.evals.table import comparison_table
from hf_transfer_ext.hub.publish import push, save_result
from hf_transfer_ext.hub.record import RunRecord, describe_input
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.planning.config import load_config
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import parse_recipe
from hf_transfer_ext.teachers.demo import demo_model
from hf_transfer_ext.weights.ranks import is_first_rank


@dataclass
class MergeArguments:
    """What is merged, and what it is measured on."""

    merge_config: str = field(metadata={"help": "YAML of the merge; the model `demo` in it is Gemma 3 270M."})
    output_dir: str = field(default="runs/merge", metadata={"help": "Folder of the merged model."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is there."})
    threads: int | None = field(default=None, metadata={"help": "Tensors worked on at once; None: all cores."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:N or auto: where the merge calculates."})
    lora_rank: int | None = field(default=None, metadata={"help": "Write a LoRA of this rank on the base model."})
    data: list[str] = field(default_factory=list, metadata={"help": "Files, folders or Hub ids to measure on."})
    split: str = "test"
    limit: int | None = field(default=None, metadata={"help": "Only the first rows of each data set."})
    columns: str = field(default="{}", metadata={"help": "JSON: schema name -> your column."})
    metrics: str = field(default="perplexity", metadata={"help": "Names, comma-separated."})
    template: str = field(default="auto", metadata={"help": "auto, chat or plain."})
    batch_size: int = 8
    dtype: str = field(default="float32", metadata={"help": "In which the models are measured."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to publish the result in."})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (arguments,) = parse_recipe(MergeArguments, argv=argv)
    metrics = [name.strip() for name in arguments.metrics.split(",")]
    for name in metrics:
        resolve_metric(name)
    content = named(yaml.safe_load(Path(arguments.merge_config).read_text(encoding="utf-8")))
    plan = load_config(content)
    record = RunRecord(
        job="merging",
        recipe="recipes/merge.py",
        config={"merge": content, "measured_on": arguments.data, "metrics": metrics},
        inputs=[
            describe_input(one.path, one.revision, "base" if one == plan.base_model else "model")
            for one in plan.references
        ],
        seed=plan.seed,
    )
    with record.stage("merge"):
        report = merge(
            content, arguments.output_dir, overwrite=arguments.overwrite, threads=arguments.threads,
            device=arguments.device, lora_rank=arguments.lora_rank, progress=True,
        )  # fmt: skip
    if not is_first_rank():
        return {"report": report, "record": record}
    if arguments.data:
        with record.stage("evaluate"):
            whole = report.adapter is None  # an adapter has the tokenizer of its base
            tokenizer = load_tokenizer(arguments.output_dir if whole else plan.references[0].path)
            record.compared = {
                str(one): measure(str(one.lora or one.path), tokenizer, metrics, arguments) for one in plan.references
            }
            record.metrics = measure(arguments.output_dir, tokenizer, metrics, arguments)
        print(comparison_table({**{Path(k).name: v for k, v in record.compared.items()}, "merged": record.metrics}))
    else:
        record.not_measured.append("Nothing was measured: the run had no data.")
    if report.adapter is not None:
        lost, modules = report.adapter.residual_energy, len(report.adapter.modules)
        name = f"change left out at rank {report.adapter.rank}"
        record.metrics.append(Measurement(name, lost, "share of its energy", False, modules))
    save_result(arguments.output_dir, record=record, overwrite=True)
    if report.adapter is not None:
        print(f"LoRA of rank {report.adapter.rank}: {report.adapter.residual_energy:.2%} of the change is left out")
    print(f"{report.tensors} tensors in {report.seconds:.1f} s -> {report.folder}")
    if arguments.push_to_hub:
        print(push(arguments.output_dir, arguments.push_to_hub))
    return {"report": report, "record": record}


def named(value: Any) -> Any:
    """Put the folder of the demo's model in the place of the model `demo`."""
    if isinstance(value, dict):
        return {
            key: str(demo_model()) if key in ("model", "base_model") and one == "demo" else named(one)
            for key, one in value.items()
        }
    return [named(one) for one in value] if isinstance(value, list) else value


def measure(name: str, tokenizer: Any, metrics: list[str], arguments: MergeArguments) -> list[Any]:
    model = load_model(name, dtype=arguments.dtype)
    found = []
    for dataset in arguments.data:
        rows = load_rows(dataset, split=arguments.split)[: arguments.limit]
        result = evaluate(
            model, tokenizer, rows, metrics, columns=json.loads(arguments.columns), batch_size=arguments.batch_size,
            dataset=dataset, template=QuestionAnswerFormat(template=arguments.template),
        )  # fmt: skip
        found += [replace(one, name=f"{Path(dataset).stem} {one.name}") for one in result.measurements]
    return found


if __name__ == "__main__":
    main()
