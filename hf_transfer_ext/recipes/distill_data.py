"""Data of the distillation recipe: what is trained on, and what is held out to measure on."""

from __future__ import annotations

from typing import Any

from hf_transfer_ext.data.text import load_columns, load_train_and_test
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
from hf_transfer_ext.trainers.rollouts import holds_prompts_alone


def data_of(job: Any, args: DistillationConfig) -> tuple[Any, Any]:
    """The training data and the held-out data of a distillation.

    Raises:
        ValueError: The data hold prompts without completions, and a stage learns from completions.
    """
    source: dict[str, Any] = {"config_name": job.dataset_config, "revision": job.dataset_revision}
    source |= {"streaming": job.streaming, "prompts_alone": args.on_policy is not None}
    data, test = load_train_and_test(job.dataset, job.train_split, job.test_split, columns=job.columns, **source)
    for name in ("teach_steps", "trim_vocabulary", "learngene_steps", "compare_with_ce"):
        if holds_prompts_alone(data) and getattr(job, name):
            raise ValueError(
                f"`{name}` is {getattr(job, name)!r}, which needs whole texts, but {job.dataset!r} holds prompts "
                f"without completions, after which the student writes. Leave `{name}` out, or add completions."
            )
    return data, test


def data_of_task(job: Any, args: DistillationConfig) -> tuple[Any, Any, Any]:
    """The data of another task: of the teacher, of the student, and `test_rows` of those held out."""
    source: dict[str, Any] = {"config_name": job.dataset_config, "revision": job.dataset_revision}
    source |= {"streaming": job.streaming, "columns": job.columns, "load": load_columns}
    data, test = load_train_and_test(job.dataset, job.train_split, job.test_split, **source)
    if test is not None:
        test = test.take(job.test_rows if job.streaming else min(job.test_rows, len(test)))
    return data, rows_of_student(job, args, data), test


def rows_of_student(job: Any, args: DistillationConfig, data: Any) -> Any:
    """The rows that the student learns from: all, or `train_rows` of them, drawn with the seed.

    Raises:
        ValueError: There are not as many, or they are streamed.
    """
    if job.train_rows is None:
        return data
    if job.streaming:
        raise ValueError(
            "`train_rows` draws from all rows, but `streaming` reads them one after the other. Leave one of them out, "
            "or set `train_split` to a slice such as `train[:100]`."
        )
    if not 1 <= job.train_rows <= len(data):
        raise ValueError(
            f"`train_rows` is {job.train_rows}, but {job.dataset!r} has {len(data)} rows in {job.train_split!r}. Give "
            "a number from 1 to that, or leave it out."
        )
    return data.shuffle(seed=args.seed).select(range(job.train_rows))
