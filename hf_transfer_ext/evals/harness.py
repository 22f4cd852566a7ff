"""Run tasks of lm-evaluation-harness on a loaded model and return measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.models.plumbing import active_adapter, evaluation_mode
from hf_transfer_ext.registry import unknown_name

#: Metric of the harness -> unit. For others, the unit is the name in the harness.
UNITS = {
    "acc": "share of questions", "acc_norm": "share of questions", "exact_match": "share of questions",
    "f1": "F1", "perplexity": "perplexity per example", "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte", "bits_per_byte": "bits per byte",
}  # fmt: skip


def measure_with_lm_eval(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    adapter: str | None = None,
    task_folder: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> list[Measurement]:
    """Run tasks of lm-evaluation-harness through its Python API, without loading the model again.

    Args:
        tasks: Names of tasks or groups: built-in ones ("hellaswag", which loads its data from the Hub) or those in
            `task_folder`.
        adapter: Adapter of `model` to evaluate, "base" for its base model; None for the active one.
        task_folder: Folder of task files in YAML, whose data may be local files (`dataset_path: json`). Such a file
            can run Python code (`!function`), so only use a folder that you trust.
        shots: Few-shot examples before each question; None for the default of the task.
        limit: Only the first examples of each task.

    Returns:
        One measurement per task and metric, named "task metric", with the direction that the task declares and, if the
        harness reports a standard error, an interval of +- 1.96 standard errors.

    Raises:
        ImportError: The harness is not installed.
        ValueError: Unknown task, no task, or a task folder that does not exist.

    Source: Gao et al., "A framework for few-shot language model evaluation",
    https://github.com/EleutherAI/lm-evaluation-harness
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lm-evaluation-harness is not installed: pip install 'hf_transfer_ext[lm_eval]'") from error
    if not tasks:
        raise ValueError("`tasks` is empty: name at least one task of the harness or of `task_folder`.")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise ValueError(f"`task_folder` must be a folder of YAML files, but {str(task_folder)!r} is not a folder.")
    manager = TaskManager(include_path=str(task_folder) if task_folder is not None else None)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ValueError(unknown_name("task of lm-evaluation-harness", name, manager.all_tasks)[:400])
    with evaluation_mode(model), active_adapter(model, adapter):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            wrapped, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False,
            apply_chat_template=apply_chat_template, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip
    return as_measurements(found or {})


def as_measurements(found: Mapping[str, Any]) -> list[Measurement]:
    """The result of the harness's `simple_evaluate` as measurements."""
    measurements = []
    for task, values in found.get("results", {}).items():
        count = int(found.get("n-samples", {}).get(task, {}).get("effective", values.get("sample_len", 0)))
        directions = found.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, (int, float)) and not isinstance(error, bool)
            interval = (value - 1.96 * error, value + 1.96 * error) if known else None
            label = f"{task} {metric}" if filtered == "none" else f"{task} {metric}({filtered})"
            better = directions.get(metric)
            measurements.append(
                Measurement(
                    label, float(value), UNITS.get(metric, metric), better is not False, count, interval, dataset=task
                )
            )
    return measurements
