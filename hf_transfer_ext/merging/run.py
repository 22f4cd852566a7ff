"""A merge from its configuration to a model folder that is either whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from hf_transfer_ext.files import refuse_existing_output, write_text
from hf_transfer_ext.hub.privacy import public_text
from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.planning.companions import companion_files
from hf_transfer_ext.merging.planning.config import MergeConfig, load_config
from hf_transfer_ext.merging.planning.layout import TensorJob, output_config, plan_tensors, set_vocabulary_size
from hf_transfer_ext.merging.planning.vocabulary import (
    Vocabulary,
    build_vocabulary,
    chat_template_of,
    set_special_tokens,
    write_tokenizer,
)
from hf_transfer_ext.merging.streaming.stream import write_tensors
from hf_transfer_ext.merging.streaming.whole_model import with_model_thresholds
from hf_transfer_ext.weights.checkpoints import MAX_SHARD_BYTES
from hf_transfer_ext.weights.devices import resolve_device
from hf_transfer_ext.weights.opened import InputModel, open_model
from hf_transfer_ext.weights.ranks import Ranks, local_ranks, ranks_of_launch
from hf_transfer_ext.weights.reference import ModelReference
from hf_transfer_ext.weights.resume import key_of, resumable_folder

if TYPE_CHECKING:
    from hf_transfer_ext.adapters.extract import ExtractionReport


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or would do.

    Args:
        folder: The output folder.
        method: Name of the merge method.
        models: The models, the base first.
        tensors: Number of tensors of the result.
        parameters: Number of its parameters.
        read_bytes: Bytes of all input tensors, each counted once.
        written_bytes: Bytes of the result's tensors.
        resumed_tensors: Tensors that an earlier run, which was killed, had finished.
        seconds: Wall time; 0 for a dry run.
        adapter: What the adapter holds and leaves out, where the result is one.
        notes: Tensors that were copied or left out, and filters that fit nothing; one sentence each.
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
    device: str | torch.device = "cpu",
    lora_rank: int | None = None,
    dry_run: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    progress: bool = False,
    alone: bool = False,
) -> MergeReport:
    """Merge the models of a configuration into `out_dir`.

    Under `accelerate launch` or `torchrun` all processes call this, and the tensors are shared out over them. The
    bytes are those of one process, an error of one is raised in all, and the first one publishes the folder.

    A run that was killed leaves a hidden folder beside `out_dir`; the same merge started again goes on from there, and
    ends with the same bytes.

    Args:
        config: A mapping in the grammar of `merging.plan`, or the path of a YAML file.
        overwrite: Replace a model that is in `out_dir` already.
        threads: Number of tensors that are worked on at once; all cores if None, and at most four on a GPU.
        device: `cpu`, `cuda`, `cuda:N`, or `auto` for a GPU where there is one. Results of a GPU agree with those of
            the CPU to the rounding of float32. A LoRA is calculated on the CPU.
        lora_rank: Write a LoRA adapter of this rank on the base model instead of a model; wins over `output.lora`.
        dry_run: Open and check everything but the room on the disk, write nothing.
        max_shard_bytes: Largest size of a file of the result.
        allow_pickle: Accept `pytorch_model.bin`, loaded with `weights_only=True`.
        allow_nonfinite: Accept NaN and infinity in the inputs.
        progress: Show a bar with bytes per second and the time left.
        alone: Work as one process, though a launcher started several: where only one of them calls this.

    Returns:
        What was done.

    Raises:
        ValueError: The configuration or the models do not allow the merge; nothing has been written.
        FileExistsError: `out_dir` holds a model, or another merge into it is running.
        OSError: A file cannot be read or written, or the disk is full.
    """
    began = time.perf_counter()
    with ranks_of_launch(alone=alone) as ranks:
        with ranks.together():
            parsed = load_config(config)
            target = refuse_existing_output(out_dir, overwrite=overwrite)
            if threads is not None and threads < 1:
                raise ValueError(f"`threads` has to be at least 1, got {threads}.")
            where = _own_device(device, ranks)
            rank = parsed.lora_rank if lora_rank is None else lora_rank
            if rank is not None and rank < 1:
                raise ValueError(f"`lora_rank` has to be at least 1, got {rank}.")
            models = _open_all(parsed, allow_pickle)
        try:
            with ranks.together():
                donor = models[parsed.references[0]]
                vocabulary = build_vocabulary(parsed, models) if parsed.tokenizer is not None else None
                template = chat_template_of(parsed, models)
                notes: list[str] = []
                jobs = plan_tensors(parsed, models, vocabulary, notes)
                report = MergeReport(
                    folder=str(target),
                    method=parsed.merge_method,
                    models=[str(reference) for reference in models],
                    tensors=len(jobs),
                    parameters=sum(job.numel for job in jobs),
                    read_bytes=sum(job.input_bytes for job in jobs),
                    written_bytes=sum(job.spec.nbytes for job in jobs),
                    notes=tuple(notes),
                )
                if rank is not None:
                    report = replace(report, written_bytes=sum(job.factor_bytes(rank) for job in jobs))
                text = public_yaml(config)
            if dry_run:
                return report
            workers = threads or _threads_on(where)
            jobs = with_model_thresholds(
                jobs, threads=workers, device=where, allow_nonfinite=allow_nonfinite, ranks=ranks
            )
            content = _plan_content(parsed, jobs, vocabulary, max_shard_bytes, where.type)
            if rank is not None:
                adapter = None
                with ranks.together():
                    if ranks.is_first:
                        from hf_transfer_ext.merging.streaming.as_lora import (
                            write_adapter,  # which imports this package
                        )

                        adapter = write_adapter(
                            parsed,
                            models,
                            jobs,
                            target,
                            rank=rank,
                            content=content,
                            files={_CONFIG_FILE: text},
                            allow_nonfinite=allow_nonfinite,
                            overwrite=overwrite,
                            progress=progress,
                        )
                adapter = ranks.gather(adapter)[0]
                size = (target / "adapter_model.safetensors").stat().st_size
                return replace(report, adapter=adapter, written_bytes=size, seconds=time.perf_counter() - began)
            key = ranks.gather(key_of(content, [file for model in models.values() for file in model.files]))[0]
            with resumable_folder(target, key, ranks, overwrite=overwrite) as folder:
                own = sum(job.input_bytes for job in ranks.share_of(jobs))
                with _bar(own, progress and ranks.is_first) as advance:
                    done = write_tensors(
                        folder,
                        jobs,
                        ranks=ranks,
                        threads=workers,
                        device=where,
                        max_shard_bytes=max_shard_bytes,
                        seed=parsed.seed,
                        allow_nonfinite=allow_nonfinite,
                        advance=advance,
                    )
                with ranks.together():
                    if ranks.is_first:
                        described = output_config(parsed, models, donor)
                        if vocabulary is not None:
                            set_vocabulary_size(described, vocabulary.size)
                        _write_companions(folder, donor, described, text)
                        source = parsed.tokenizer.source if parsed.tokenizer is not None else None
                        if vocabulary is not None and source not in ("union", "base", donor.reference):
                            set_special_tokens(vocabulary, donor, described, folder)
                            write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
                        if vocabulary is not None or template is not None:
                            write_tokenizer(vocabulary, template, donor, folder)
        finally:
            for model in models.values():
                model.close()
    return replace(report, resumed_tensors=done, seconds=time.perf_counter() - began)


def _own_device(device: str | torch.device, ranks: Ranks) -> torch.device:
    """The device of this process: those of one machine take its GPUs in turn, unless one is named."""
    found = resolve_device(device)
    if found.type == "cuda" and ranks.count > 1 and torch.device(device if device != "auto" else "cuda").index is None:
        return torch.device("cuda", local_ranks()[0] % torch.cuda.device_count())
    return found


def _threads_on(device: torch.device) -> int:
    """All cores, shared with the other processes on the machine."""
    return GPU_THREADS if device.type == "cuda" else max(1, (os.cpu_count() or 1) // local_ranks()[1])


#: Threads that keep a GPU busy while others read and write; each takes memory on it.
GPU_THREADS = 4

#: The configuration of the merge in its result, under the name by which it is known on the Hub.
_CONFIG_FILE = "mergekit_config.yml"


def _open_all(config: MergeConfig, allow_pickle: bool) -> dict[ModelReference, InputModel]:
    models: dict[ModelReference, InputModel] = {}
    try:
        for reference in config.references:
            models[reference] = open_model(reference, allow_pickle=allow_pickle)
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return models


def _plan_content(
    config: MergeConfig, jobs: list[TensorJob], vocabulary: Vocabulary | None, max_shard_bytes: int, device: str
) -> dict[str, Any]:
    """Everything that the bytes of the result depend on, beside the files of the models."""
    return {
        "config": repr(config),
        "layout": [(job.name, job.shape, str(job.dtype)) for job in jobs],
        "vocabulary": sorted(vocabulary.tokens.items()) if vocabulary is not None else None,
        "shards": max_shard_bytes,
        "arithmetic": [device, kernels.LIBRARY is not None],
    }


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, disable=not show, desc="merging", smoothing=0.1) as bar:
        yield bar.update


def public_yaml(config: Mapping[str, Any] | str | Path) -> str:
    """The configuration as it goes into the result: word for word, unless it names folders of this machine."""
    text = None if isinstance(config, Mapping) else Path(config).read_text(encoding="utf-8")
    content = dict(config) if isinstance(config, Mapping) else yaml.safe_load(text or "")
    public = _without_local_paths(content)
    return text if text is not None and public == content else yaml.safe_dump(public, sort_keys=False)


def _without_local_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_local_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(one) for one in value]
    return public_text(str(value)) if isinstance(value, (str, Path)) else value


def _write_companions(folder: Path, donor: InputModel, config: dict[str, Any], text: str) -> None:
    """Config, tokenizer and the configuration of the merge."""
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / _CONFIG_FILE, text)
    for name in companion_files(donor.folder, config):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(donor.folder / name, folder / name)
