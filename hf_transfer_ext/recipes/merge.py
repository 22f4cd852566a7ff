"""Merge models and measure what became of each: `python recipes/merge.py --config recipes/configs/merge/demo.yaml`.

Merges as a YAML in the grammar of mergekit says, measures all parents and the result on the same data, and puts a card
with the parents and the YAML into the result. Under `accelerate launch` tensors are split across processes, and the
first one measures. `hf-transfer-ext merge CONFIG.yml OUT_DIR` does the merge alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.metric_run import MetricRun, load_sets, resolve_all
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.record import describe_dataset, last_name, read_record
from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.planning.config import load_config
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import parse_recipe, read_yaml, setting
from hf_transfer_ext.recipes.publishing import PublishArguments
from hf_transfer_ext.recipes.run import DEMO, model_path, run_recipe, start_record
from hf_transfer_ext.settings import REQUIRED
from hf_transfer_ext.weights.ranks import is_first_rank
from hf_transfer_ext.weights.reference import ModelReference


@dataclass
class MergeArguments(PublishArguments):
    """Which models to merge, and which data to measure them on."""

    merge_config: str = setting(REQUIRED, "merge", "YAML of the merge; the model `demo` in it is Gemma 3 270M.")
    threads: int | None = setting(None, "merge", "Tensors processed at once; none: all cores.")
    device: str = setting("cpu", "merge", "cpu, cuda, cuda:N or auto: where the merge is computed.")
    lora_rank: int | None = setting(None, "merge", "Write a LoRA of this rank on the base model.")
    data: list[str] = setting([], "evaluation", "Files, folders or Hub ids to measure on.")
    split: str = setting("test", "evaluation", "Split of each.")
    limit: int | None = setting(None, "evaluation", "Only the first rows of each data set.")
    columns: dict[str, str] = setting({}, "evaluation", "Name in the schema -> your column: {question: q, answer: a}.")
    metrics: list[Any] = setting(["perplexity"], "evaluation", "Names, or {name: {option: value}}.")
    template: str = setting("auto", "evaluation", "auto, chat or plain.")
    batch_size: int = setting(8, "evaluation", "Examples in a forward pass.")
    dtype: str = setting("float32", "evaluation", "Dtype in which the models are measured.")
    output_dir: str = setting("runs/merge", "", "Folder of the merged model.")
    overwrite: bool = setting(False, "", "Replace a model that is there.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (job,) = parse_recipe(MergeArguments, argv=argv)
    publication = job.publication()
    resolve_all(job.metrics)
    content = with_demo(read_yaml(job.merge_config))
    plan = load_config(content)
    record = start_record("merging", __file__, argv, job, seed=plan.seed)
    with record.stage("merge"):
        where: Any = {"threads": job.threads, "device": job.device, "lora_rank": job.lora_rank}
        report = merge(content, job.output_dir, overwrite=job.overwrite, progress=True, **where)
    if not is_first_rank():
        return {"report": report, "record": record}
    merged = read_record(job.output_dir)
    record.config["merge"], record.inputs, record.metrics = merged.config, merged.inputs, merged.metrics
    record.call = merged.call
    measured: dict[str, list[Any]] = {}
    if job.data:
        record.inputs += [describe_dataset(name) for name in job.data]
        run = MetricRun(
            job.metrics,
            load_sets(job.data, split=job.split, limit=job.limit),
            columns=job.columns,
            batch_size=job.batch_size,
            template=QuestionAnswerFormat(template=job.template),
        )
        # An adapter has the tokenizer of its base.
        tokenizer = load_tokenizer(job.output_dir if report.adapter is None else plan.references[0].path)
        parents = {short_name(one): str(one.lora or one.path) for one in plan.references}
        for name, path in {**parents, "merged": job.output_dir}.items():
            with record.stage(f"measure {name}"):
                model = load_model(path, dtype=job.dtype)
                measured[name] = [
                    m for _, found in run.results_by_folder(model, tokenizer, name) for m in found.measurements
                ]
    else:
        record.not_measured.append("Nothing was measured: the run had no data.")
    measured["merged"] = [*measured.get("merged", []), *merged.metrics]
    finish_run(job.output_dir, record, measured, result="merged", plot=None)
    publication.publish(job.output_dir)
    if report.adapter is not None:
        print(f"LoRA of rank {report.adapter.rank}: {report.adapter.residual_energy:.2%} of the update is left out")
    print(f"{report.tensors} tensors in {report.seconds:.1f} s -> {report.folder}")
    return {"report": report, "record": record}


def short_name(reference: ModelReference) -> str:
    """A parent in the table: the last components of its folders, Hub ids as they are."""
    return "+".join(last_name(path) for path in (reference.path, reference.lora) if path is not None)


def with_demo(value: Any) -> Any:
    """Put the folder of the demo's model in the place of the model `demo`."""
    if isinstance(value, dict):
        return {
            key: str(model_path(one)) if key in ("model", "base_model") and one == DEMO else with_demo(one)
            for key, one in value.items()
        }
    return [with_demo(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    run_recipe("merge", main)
