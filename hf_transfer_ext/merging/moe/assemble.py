"""A mixture of experts from its configuration to a model folder that is written atomically."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_transfer_ext.files import refuse_existing_output, require_free_space, write_text
from hf_transfer_ext.hub.inputs import InputsInBackground
from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.methods.passthrough import passthrough
from hf_transfer_ext.merging.moe.architectures import (
    PROJECTIONS,
    Architecture,
    check_fit,
    choose_architecture,
    mixture_config,
)
from hf_transfer_ext.merging.moe.gates import Gates, alike_layers, make_gates
from hf_transfer_ext.merging.moe.plan import RANDOM_MODES, Expert, MoeConfig, load_moe_config
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.merging.planning.names import layer_count
from hf_transfer_ext.merging.record import finish_merge, inputs_of
from hf_transfer_ext.merging.streaming.companions import copy_companions, public_yaml
from hf_transfer_ext.merging.streaming.stream import write_tensors
from hf_transfer_ext.weights.checkpoints import MAX_SHARD_BYTES
from hf_transfer_ext.weights.dtypes import FLOAT_DTYPES, Dtype, stored_dtype
from hf_transfer_ext.weights.opened import DerivedInput, InputModel, InputTensor, Scratch, is_buffer, open_model
from hf_transfer_ext.weights.reference import ModelReference
from hf_transfer_ext.weights.resume import resumable_folder, work_of


@dataclass(frozen=True)
class MoeReport:
    """What was assembled.

    Args:
        architecture: `model_type` of the result.
        parameters: Number of its parameters.
        written_bytes: Bytes of its tensors.
        alike_layers: Layers in which the rows of the gate are nearly alike; the prompts do not tell the experts apart.
        resumed_tensors: Tensors that an earlier run, which was killed, had finished.
        seconds: Wall time; 0 for a dry run.
    """

    folder: str
    architecture: str
    models: list[str]
    tensors: int
    parameters: int
    written_bytes: int
    alike_layers: list[int]
    resumed_tensors: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class HeldInput:
    """A tensor that is in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> Dtype:
        return stored_dtype(self.tensor.dtype)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        out.copy_(self.tensor.reshape(-1)[start : start + out.numel()])


@dataclass(frozen=True)
class NoisyInput(DerivedInput):
    """A tensor with normal noise added, whose numbers depend on their places only (Box and Muller's transform)."""

    inner: InputTensor
    scale: float
    seed: int
    name: str

    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        self.inner.read(start, out, scratch)
        noise = Noise(self.seed, self.name, start)
        radius, angle = (noise.words(stream, out.numel()).astype(np.float64) for stream in (0, 1))
        normal = np.sqrt(-2 * np.log((radius + 1) / 2.0**32)) * np.cos(2 * np.pi * angle / 2.0**32)
        out += torch.from_numpy((self.scale * normal).astype(np.float32))


def assemble(
    config: Mapping[str, Any] | str | Path,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    allow_same_experts: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
) -> MoeReport:
    """Make a mixture of experts of dense models: attention, norms and embeddings of the base, experts of the others.

    A run that was killed leaves a hidden folder beside `out_dir`; the same one started again goes on from there.

    With equal experts (and, where there is a shared expert, a `residual_scale` of 0 for it) the result calculates
    what the base does, whatever the gates: its weights sum to 1.

    Args:
        config: A mapping in the grammar of `moe.plan`, or the path of a YAML file.
        overwrite: Replace a model that is in `out_dir` already.
        threads: Number of tensors that are worked on at once; all cores if None.
        dry_run: Open and check everything but the prompts' states, write nothing.
        allow_same_experts: Accept experts that are all the same model, which is of use before training only.
        max_shard_bytes: Largest size of a file of the result.
        allow_pickle: Accept `pytorch_model.bin`, loaded with `weights_only=True`.

    Raises:
        ValueError: The configuration or the models do not allow the mixture; nothing has been written.
        FileExistsError: `out_dir` holds a model.
    """
    began = time.perf_counter()
    parsed = load_moe_config(config)
    sources = [None if isinstance(config, Mapping) else config]
    target = refuse_existing_output(out_dir, overwrite=overwrite, inputs=sources)
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` has to be at least 1, got {threads}.")
    _check_experts(parsed, allow_same_experts)
    models: dict[ModelReference, InputModel] = {}
    try:
        for reference in parsed.references:
            models[reference] = open_model(reference, allow_pickle=allow_pickle)
        opened = [checkpoint for model in models.values() for checkpoint in model.opened]
        read = [file for checkpoint in opened for file in checkpoint.stamps]
        refuse_existing_output(target, overwrite=overwrite, inputs=read)
        base = models[parsed.base_model]
        if base.adapted is not None and parsed.gate_mode not in RANDOM_MODES:
            raise ValueError(
                f"`gate_mode: {parsed.gate_mode}` runs the base model, so {str(parsed.base_model)!r} cannot be an "
                "adapter. Merge it into its base first."
            )
        architecture = choose_architecture(parsed, list(models.values()))
        mixture = mixture_config(architecture, parsed, base)
        check_fit(architecture, mixture, base)
        layers = layer_count(base)
        gated = [*parsed.experts, *parsed.shared_experts]
        experts_jobs = list(_weight_jobs(parsed, architecture, models, layers))
        gates = torch.zeros(layers, len(gated), mixture.hidden_size)
        if not dry_run:
            gates = make_gates(parsed, base, gated, layers, mixture.hidden_size)
        jobs = sorted([*experts_jobs, *_gate_jobs(parsed, architecture, gates, base)], key=_order)
        report = MoeReport(
            folder=str(target),
            architecture=architecture.model_type,
            models=[str(reference) for reference in models],
            tensors=len(jobs),
            parameters=sum(job.numel for job in jobs),
            written_bytes=sum(job.spec.nbytes for job in jobs),
            alike_layers=[] if dry_run else alike_layers(gates[:, : len(parsed.experts)]),
        )
        if dry_run:
            require_free_space(target, report.written_bytes)
            return report
        content = {
            "config": repr(parsed),
            "layout": [(job.name, job.shape, str(job.dtype)) for job in jobs],
            "gates": hashlib.sha256(gates.numpy().tobytes()).hexdigest(),
            "shards": max_shard_bytes,
            "arithmetic": kernels.LIBRARY is not None,
        }
        wanted = inputs_of(models, parsed.base_model)
        call: dict[str, Any] = {"config": config, "allow_same_experts": allow_same_experts}
        call |= {"max_shard_bytes": max_shard_bytes, "allow_pickle": allow_pickle}
        inputs, work = InputsInBackground(wanted), work_of(content, opened)
        with inputs, resumable_folder(target, work, overwrite=overwrite) as folder:
            digests: dict[str, str] = {}
            workers = threads or os.cpu_count() or 1
            resumed = write_tensors(folder, jobs, threads=workers, max_shard_bytes=max_shard_bytes, digests=digests)
            _write_config(folder, mixture, architecture, jobs[0].dtype)
            write_text(folder / "mergekit_moe_config.yml", public_yaml(config))
            copy_companions(base.folder, folder, mixture.to_dict())
            seconds = time.perf_counter() - began
            text = (folder / "mergekit_moe_config.yml").read_text(encoding="utf-8")
            finish_merge(
                folder, "moe", text, inputs,
                seed=parsed.seed, seconds=seconds, script=__file__, call=call, wanted=wanted, digests=digests,
            )  # fmt: skip
    finally:
        for model in models.values():
            model.close()
    return replace(report, resumed_tensors=resumed, seconds=time.perf_counter() - began)


def _check_experts(config: MoeConfig, allow_same: bool) -> None:
    if config.gate_mode not in RANDOM_MODES:
        for i, expert in enumerate(config.shared_experts):
            if not expert.positive_prompts:
                raise ValueError(
                    f"`shared_experts[{i}]` needs `positive_prompts` for `gate_mode: {config.gate_mode}`."
                )
        if len({expert.source_model for expert in config.experts}) == 1 < len(config.experts) and not allow_same:
            raise ValueError(
                "All experts are the same model, so the mixture is larger than it and no better before it is trained. "
                "If you will train it, choose `gate_mode: random` or pass --allow-same-experts."
            )


def _weight_jobs(
    config: MoeConfig, architecture: Architecture, models: Mapping[ModelReference, InputModel], layers: int
) -> Iterator[TensorJob]:
    """The tensors of the base outside the feed-forward layers, and the feed-forward layers of the experts."""
    base = models[config.base_model]
    for name, tensor in base.tensors.items():
        if ".mlp." not in name and not is_buffer(name, tensor):
            yield _job(name, tensor, 1.0, config)
    for layer in range(layers):
        for projection in PROJECTIONS:
            source = f"model.layers.{layer}.mlp.{projection}.weight"
            for number, expert in enumerate(config.experts):
                name = architecture.expert(layer, number, projection)
                yield _expert_job(name, source, projection, expert, models, base, config)
            for expert in config.shared_experts:
                name = architecture.shared_expert(layer, projection)
                yield _expert_job(name, source, projection, expert, models, base, config)


def _expert_job(
    name: str,
    source: str,
    projection: str,
    expert: Expert,
    models: Mapping[ModelReference, InputModel],
    base: InputModel,
    config: MoeConfig,
) -> TensorJob:
    model = models[expert.source_model]
    if layer_count(model) != layer_count(base):
        raise ValueError(
            f"Expert {str(expert.source_model)!r} has {layer_count(model)} layers and the base model "
            f"{str(base.reference)!r} {layer_count(base)}. All models need the same number."
        )
    tensor, wanted = model[source], base[source].shape
    if tensor.shape != wanted:
        raise ValueError(
            f"Tensor {source!r} of expert {str(expert.source_model)!r} has shape {list(tensor.shape)}, but "
            f"{list(wanted)} in the base model {str(base.reference)!r}. Experts need its sizes."
        )
    extra = [other for other in model.tensors if ".mlp." in other and other.endswith(".bias")]
    if extra:
        raise ValueError(f"Expert {str(expert.source_model)!r} has {extra[0]!r}; mixtures have no biases there.")
    noisy = NoisyInput(tensor, expert.noise_scale, config.seed, name) if expert.noise_scale else tensor
    return _job(name, noisy, expert.residual_scale if projection == "down_proj" else 1.0, config)


def _gate_jobs(config: MoeConfig, architecture: Architecture, gates: Gates, base: InputModel) -> Iterator[TensorJob]:
    dtype = config.dtype or base["model.embed_tokens.weight"].dtype
    for layer, gate in enumerate(gates.to(dtype.torch)):
        experts = gate[: len(config.experts)].contiguous()
        yield _job(architecture.gate(layer), HeldInput(experts), 1.0, config)
        if config.shared_experts:
            yield _job(architecture.shared_gate(layer), HeldInput(gate[len(experts) :].contiguous()), 1.0, config)


def _job(name: str, tensor: InputTensor, scale: float, config: MoeConfig) -> TensorJob:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"Tensor {name!r} would be made of one of dtype {tensor.dtype}. Use models that are not quantized: a "
            "mixture does not carry their scales."
        )
    dtype = config.dtype or tensor.dtype
    plain = scale == 1.0 and dtype == tensor.dtype and not isinstance(tensor, NoisyInput)
    return TensorJob(name, tensor.shape, dtype, passthrough, None, (tensor,), {"scale": [scale]}, is_copy=plain)


def _order(job: TensorJob) -> tuple[int, int]:
    """Embeddings, layers by number, head; what belongs together lies in one file."""
    parts = job.name.split(".")
    if parts[1] == "layers":
        return 1, int(parts[2])
    return (0, 0) if "embed_tokens" in job.name else (2, 0)


def _write_config(folder: Path, mixture: Any, architecture: Architecture, dtype: Dtype) -> None:
    mixture.architectures = [architecture.class_name]
    mixture.dtype = dtype.torch
    mixture.save_pretrained(str(folder))
