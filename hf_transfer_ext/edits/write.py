"""The result of an edit as a folder: a model of which some tensors are calculated and the others copied, or a LoRA."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_transfer_ext.adapters.extract import ExtractionReport, write_change
from hf_transfer_ext.files import write_text, written_aside
from hf_transfer_ext.merging.methods.passthrough import passthrough
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.merging.streaming.as_lora import MergedInput, known_result
from hf_transfer_ext.merging.streaming.companions import copy_companions
from hf_transfer_ext.merging.streaming.stream import JOURNAL, write_tensors
from hf_transfer_ext.weights.opened import InputModel, InputTensor, has_token_rows
from hf_transfer_ext.weights.resume import work_of

#: Called with the folder before it is published, and with what the adapter leaves out, where the result is one.
Complete = Callable[[Path, ExtractionReport | None], None]


def copy_of(name: str, tensor: InputTensor) -> TensorJob:
    """The job that copies a tensor; the bytes of a stored one."""
    return TensorJob(name, tensor.shape, tensor.dtype, passthrough, None, (tensor,), {"scale": [1.0]}, is_copy=True)


def all_jobs(model: InputModel, jobs: Mapping[str, TensorJob]) -> list[TensorJob]:
    """A job for every tensor of the model, in its order, and for those that are new; the others are copied."""
    names = [*model.tensors, *(name for name in jobs if name not in model.tensors)]
    return [jobs.get(name) or copy_of(name, model.tensors[name]) for name in names]


def write_tensors_of(
    folder: Path, model: InputModel, jobs: Mapping[str, TensorJob], *, threads: int | None = None, seed: int = 0
) -> None:
    """Write the tensors, the config and the tokenizer of an edited model into an existing folder."""
    workers = threads or max(1, os.cpu_count() or 1)
    write_tensors(folder, all_jobs(model, jobs), threads=workers, seed=seed)
    for journal in folder.glob(f"{JOURNAL}-*"):
        journal.unlink()
    config = _config(model, jobs)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    copy_companions(model.folder, folder, config)


def write_model(
    model: InputModel,
    jobs: Mapping[str, TensorJob],
    out: str | Path,
    *,
    complete: Complete,
    also: tuple[str, ...] = (),
    overwrite: bool = False,
    threads: int | None = None,
    seed: int = 0,
) -> None:
    """Write an edited model as a folder, atomically.

    Args:
        also: Further files that this kind of result consists of, which `overwrite` may replace.
    """
    read = [file for checkpoint in model.opened for file in checkpoint.stamps]
    with written_aside(out, overwrite=overwrite, inputs=read, also=also) as folder:
        write_tensors_of(folder, model, jobs, threads=threads, seed=seed)
        complete(folder, None)


def write_lora(
    model: InputModel,
    jobs: Mapping[str, TensorJob],
    out: str | Path,
    *,
    rank: int,
    content: Mapping[str, Any],
    complete: Complete,
    overwrite: bool = False,
    seed: int = 0,
) -> ExtractionReport:
    """Write the change of an edit as a PEFT LoRA on the model, atomically.

    Args:
        content: What the result depends on beside the files of the models.

    Raises:
        ValueError: The edit changes nothing, or the model is an adapter itself.
    """
    if model.adapted is not None:
        raise ValueError(f"A LoRA needs a base model that is not an adapter itself, got {str(model.reference)!r}.")
    if all(job.is_copy for job in jobs.values()):
        raise ValueError(
            "Nothing changes, so there is no LoRA to write. Raise the strength, or leave `lora_rank` out."
        )
    tensors: dict[str, InputTensor] = dict(model.tensors)
    for name, job in jobs.items():
        tensors[name] = known_result(job, model) or MergedInput(job, seed, True)
    return write_change(
        model,
        replace(model, tensors=tensors, opened=[]),
        out,
        rank=rank,
        dtype=torch.float32,
        work=work_of({**content, "rank": rank}, model.opened),
        base_model=model.reference.path,
        revision=model.reference.revision,
        overwrite=overwrite,
        complete=complete,
    )


def _config(model: InputModel, jobs: Mapping[str, TensorJob]) -> dict[str, Any]:
    """config.json of the result; a head that became a tensor of its own is not tied any more."""
    content = copy.deepcopy(model.config)
    if any(name not in model.tensors and has_token_rows(name) for name in jobs):
        for part in (content, content.get("text_config", {})):
            if part is content or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    return content
