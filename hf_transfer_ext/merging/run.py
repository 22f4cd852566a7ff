"""Run a merge, from its configuration to a model folder that is written atomically."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_transfer_ext.files import refuse_existing_output, write_text
from hf_transfer_ext.hub.inputs import InputsInBackground
from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.planning.config import MergeConfig, load_config
from hf_transfer_ext.merging.planning.extra import ExtraFiles, open_extra
from hf_transfer_ext.merging.planning.layout import TensorJob, output_config, plan_tensors, set_vocabulary_size
from hf_transfer_ext.merging.planning.vocabulary import (
    Vocabulary,
    build_vocabulary,
    chat_template_of,
    set_special_tokens,
    write_tokenizer,
)
from hf_transfer_ext.merging.record import finish_merge, inputs_of
from hf_transfer_ext.merging.streaming.companions import CONFIG_FILE, public_yaml, write_companions
from hf_transfer_ext.merging.streaming.stream import write_tensors
from hf_transfer_ext.merging.streaming.whole_model import with_model_thresholds
from hf_transfer_ext.progress import stage
from hf_transfer_ext.weights.checkpoints import MAX_SHARD_BYTES, Checkpoint
from hf_transfer_ext.weights.devices import resolve_device
from hf_transfer_ext.weights.opened import InputModel, open_model
from hf_transfer_ext.weights.ranks import Ranks, local_ranks, ranks_of_launch
from hf_transfer_ext.weights.reference import ModelReference
from hf_transfer_ext.weights.resume import resumable_folder, work_of

if TYPE_CHECKING:
    from hf_transfer_ext.adapters.extract import ExtractionReport

logger = logging.getLogger(__name__)

#: Adds model card and record to the folder of a result before it is published.
Complete = Callable[..., None]

#: Number of threads that keeps a GPU busy while others read and write; each needs GPU memory.
GPU_THREADS = 4


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or would do.

    Args:
        folder: The output folder.
        method: Name of the merge method.
        models: The models, starting with the base.
        tensors: Number of tensors of the result.
        parameters: Number of parameters of the result.
        read_bytes: Bytes of all input tensors, each counted once.
        written_bytes: Bytes of the result's tensors.
        resumed_tensors: Tensors that an earlier run had finished before it was killed.
        seconds: Wall time; 0 for a dry run.
        adapter: What the adapter represents and what it loses, if the result is an adapter.
        notes: One sentence for each group of copied or omitted tensors, and for each filter that matches nothing.
    """

    folder: str
    method: str
    models: list[str]
    tensors: int
    parameters: int
    read_bytes: int
    written_bytes: int
    resumed_tensors: int = 0
    seconds: float = 0.0
    adapter: ExtractionReport | None = None
    notes: tuple[str, ...] = ()


def merge(
    config: Mapping[str, Any] | str | Path,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    lora_rank: int | None = None,
    dry_run: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    progress: bool = False,
    alone: bool = False,
) -> MergeReport:
    """Merge the models of a configuration into `out_dir`.

    Under `accelerate launch` or `torchrun`, all processes call this function, and the tensors are split across them.
    The result is byte-for-byte that of a single process, an error in one process is raised in all, and the first one
    publishes the folder.

    A run that is killed leaves a hidden folder next to `out_dir`; running the same merge again resumes from there, and
    gives the same bytes.

    Args:
        config: A mapping in the grammar of `planning.config`, or the path of a YAML file.
        overwrite: Replace a model that already is in `out_dir`.
        threads: Number of tensors that are merged at the same time; all cores if None, and at most four on a GPU.
        device: `cpu`, `cuda`, `cuda:N`, or `auto` for a GPU where there is one. Results of a GPU agree with those of
            the CPU to the rounding of float32. A LoRA is calculated on the CPU.
        lora_rank: Write a LoRA adapter of this rank on the base model instead of a model; overrides `output.lora`.
        dry_run: Validate everything except free disk space; write nothing.
        max_shard_bytes: Maximum size of each file of the result.
        allow_pickle: Also accept `pytorch_model.bin`, loaded with `weights_only=True`.
        allow_nonfinite: Accept NaN and infinity in the inputs.
        progress: Show a bar with bytes per second and the time left.
        alone: Run as a single process even if a launcher started several, for when only one of them calls this.

    Returns:
        A report of the merge.

    Raises:
        ValueError: The configuration or the models do not allow the merge; nothing was written.
        FileExistsError: `out_dir` contains a model, or another merge is writing to it.
        OSError: A file cannot be read or written, or the disk is full.
    """
    began = time.perf_counter()
    with ranks_of_launch(alone=alone) as ranks, ExitStack() as inputs:
        with ranks.together():
            source = None if isinstance(config, Mapping) else config
            target = refuse_existing_output(out_dir, overwrite=overwrite, inputs=[source])
            settings = _Settings(
                target=target,
                overwrite=overwrite,
                threads=threads,
                device=_own_device(device, ranks),
                processes=ranks.count,
                max_shard_bytes=max_shard_bytes,
                allow_nonfinite=allow_nonfinite,
                progress=progress,
            )
            plan = _plan(config, lora_rank, allow_pickle, inputs)
            read = [file for checkpoint in plan.checkpoints for file in checkpoint.stamps]
            refuse_existing_output(target, overwrite=overwrite, inputs=read)
        report = plan.report(target)
        if ranks.is_first:
            for note in report.notes:
                logger.warning(note)
        if dry_run:
            return report
        jobs = with_model_thresholds(
            plan.jobs, threads=settings.workers, device=settings.device, allow_nonfinite=allow_nonfinite, ranks=ranks
        )
        plan = replace(plan, jobs=jobs)
        wanted = inputs_of(plan.models, plan.config.base_model) if ranks.is_first else []
        described = inputs.enter_context(InputsInBackground(wanted))
        write = _write_adapter if plan.lora_rank else _write_model

        def complete(
            folder: Path, adapter: ExtractionReport | None = None, digests: Mapping[str, str] | None = None
        ) -> None:
            seconds = time.perf_counter() - began
            finish_merge(
                folder,
                "merge",
                plan.text,
                described,
                seed=plan.config.seed,
                seconds=seconds,
                script=__file__,
                call={
                    "config": config,
                    "lora_rank": lora_rank,
                    "device": str(device),
                    "max_shard_bytes": max_shard_bytes,
                    "allow_pickle": allow_pickle,
                    "allow_nonfinite": allow_nonfinite,
                },
                wanted=wanted,
                adapter=adapter,
                digests=digests,
                device=settings.summary if adapter is None else None,
            )

        done = write(plan, settings, ranks, complete)
    return replace(report, **done, seconds=time.perf_counter() - began)


@dataclass(frozen=True)
class _Settings:
    """The arguments of a merge other than its configuration."""

    target: Path
    overwrite: bool
    threads: int | None
    device: str
    processes: int
    max_shard_bytes: int
    allow_nonfinite: bool
    progress: bool

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` must be at least 1, got {self.threads}.")

    @property
    def workers(self) -> int:
        """Number of threads of this process: by default all cores, split across the processes of the machine."""
        if self.threads is not None:
            return self.threads
        return GPU_THREADS if self.device != "cpu" else max(1, (os.cpu_count() or 1) // local_ranks()[1])

    @property
    def summary(self) -> dict[str, Any] | None:
        """The CPU for the record, without torch; None for a GPU, which torch describes."""
        if self.device != "cpu":
            return None
        return {"device": "cpu", "processes": self.processes, "precision": None, "threads": self.workers}


@dataclass(frozen=True)
class _Plan:
    """What will be written: the tensors and the files that accompany them.

    Args:
        text: The configuration as written to the result.
        lora_rank: Rank of the adapter if the result is one; None for a full model.
        chat_template: Chat template of the result; None for that of the donor.
        extra: The open files of extra tensors.
        notes: What is not merged as one might expect from the configuration.
    """

    config: MergeConfig
    text: str
    lora_rank: int | None
    models: dict[ModelReference, InputModel]
    extra: ExtraFiles
    jobs: list[TensorJob]
    notes: tuple[str, ...]
    vocabulary: Vocabulary | None
    chat_template: str | None

    @property
    def donor(self) -> InputModel:
        """The base model, or else the first model: its config and tokenizer are copied to the result."""
        return self.models[self.config.references[0]]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints that tensors are read from."""
        return [one for model in self.models.values() for one in model.opened] + list(self.extra.checkpoints.values())

    def report(self, target: Path) -> MergeReport:
        rank = self.lora_rank
        return MergeReport(
            folder=str(target),
            method=self.config.merge_method,
            models=[str(reference) for reference in self.models],
            tensors=len(self.jobs),
            parameters=sum(job.numel for job in self.jobs),
            read_bytes=sum(job.input_bytes for job in self.jobs),
            written_bytes=sum(job.factor_bytes(rank) if rank else job.spec.nbytes for job in self.jobs),
            notes=self.notes,
        )

    def content(self, settings: _Settings) -> dict[str, Any]:
        """Everything that the bytes of the result depend on, except the input files."""
        return {
            "config": repr(self.config),
            "layout": [(job.name, job.shape, str(job.dtype)) for job in self.jobs],
            "vocabulary": sorted(self.vocabulary.tokens.items()) if self.vocabulary is not None else None,
            "shards": settings.max_shard_bytes,
            "arithmetic": [settings.device.partition(":")[0], kernels.LIBRARY is not None],
            "allow_nonfinite": settings.allow_nonfinite,
        }


def _plan(
    config: Mapping[str, Any] | str | Path, lora_rank: int | None, allow_pickle: bool, inputs: ExitStack
) -> _Plan:
    """Check the configuration, open the models (until `inputs` is closed) and list the tensors of the result."""
    parsed = load_config(config)
    rank = parsed.lora_rank if lora_rank is None else lora_rank
    if rank is not None and rank < 1:
        raise ValueError(f"`lora_rank` must be at least 1, got {rank}.")
    models: dict[ModelReference, InputModel] = {}
    for reference in parsed.references:
        models[reference] = open_model(reference, allow_pickle=allow_pickle)
        inputs.callback(models[reference].close)
    extra = inputs.enter_context(open_extra(parsed))
    vocabulary = build_vocabulary(parsed, models) if parsed.tokenizer is not None else None
    notes: list[str] = []
    jobs = plan_tensors(parsed, models, vocabulary, extra, notes)
    return _Plan(
        config=parsed,
        text=public_yaml(config),
        lora_rank=rank,
        models=models,
        extra=extra,
        jobs=jobs,
        notes=tuple(notes),
        vocabulary=vocabulary,
        chat_template=chat_template_of(parsed, models),
    )


def _write_model(plan: _Plan, settings: _Settings, ranks: Ranks, complete: Complete) -> dict[str, Any]:
    """Write the result as a model folder; returns fields for the report."""
    work, digests = work_of(plan.content(settings), plan.checkpoints), dict[str, str]()
    with resumable_folder(settings.target, work, ranks, overwrite=settings.overwrite) as folder:
        own_bytes = sum(job.input_bytes for job in ranks.share_of(plan.jobs))
        with stage("merging", own_bytes, "B", show=settings.progress and ranks.is_first) as advance:
            resumed = write_tensors(
                folder,
                plan.jobs,
                ranks=ranks,
                threads=settings.workers,
                device=settings.device,
                max_shard_bytes=settings.max_shard_bytes,
                seed=plan.config.seed,
                allow_nonfinite=settings.allow_nonfinite,
                advance=advance,
                digests=digests,
            )
        with ranks.together():
            if ranks.is_first:
                _write_files(plan, folder)
                complete(folder, digests=digests)
    return {"resumed_tensors": resumed}


def _write_files(plan: _Plan, folder: Path) -> None:
    """Write the files that accompany the tensors: config, tokenizer, and the configuration of the merge."""
    config = output_config(plan.config, plan.models, plan.donor)
    if plan.vocabulary is not None:
        set_vocabulary_size(config, plan.vocabulary.size)
    write_companions(folder, plan.donor, config, plan.text)
    source = plan.config.tokenizer.source if plan.config.tokenizer is not None else None
    if plan.vocabulary is not None and source not in ("union", "base", plan.donor.reference):
        set_special_tokens(plan.vocabulary, plan.donor, config, folder)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if plan.vocabulary is not None or plan.chat_template is not None:
        write_tokenizer(plan.vocabulary, plan.chat_template, plan.donor, folder)


def _write_adapter(plan: _Plan, settings: _Settings, ranks: Ranks, complete: Complete) -> dict[str, Any]:
    """Write the result as a LoRA on the base model, on the first rank; returns fields for the report."""
    from hf_transfer_ext.merging.streaming.as_lora import write_adapter

    adapter: ExtractionReport | None = None
    with ranks.together():
        if ranks.is_first and plan.lora_rank is not None:
            adapter = write_adapter(
                plan.config,
                plan.models,
                plan.jobs,
                settings.target,
                rank=plan.lora_rank,
                content=plan.content(settings),
                files={CONFIG_FILE: plan.text},
                checkpoints=plan.checkpoints,
                complete=complete,
                allow_nonfinite=settings.allow_nonfinite,
                overwrite=settings.overwrite,
                progress=settings.progress,
            )
    adapter = ranks.gather(adapter)[0]
    return {
        "adapter": adapter,
        "written_bytes": (settings.target / "adapter_model.safetensors").stat().st_size,
    }


def _own_device(device: str, ranks: Ranks) -> str:
    """The device of this process: processes on a machine are assigned its GPUs in turn, unless one is specified."""
    found = resolve_device(device)
    if found == "cpu" or ranks.count == 1 or ":" in str(device):
        return found
    import torch

    return f"cuda:{local_ranks()[0] % torch.cuda.device_count()}"
