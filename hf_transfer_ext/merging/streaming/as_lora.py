"""Write the result of a merge as a LoRA adapter on the base model: the total change, truncated to a rank.

The change of the merged weights is truncated, never the individual factors of the inputs: the sum of two products
`B A` is not the product of the sums. If the method is a sum of changes (`MergeMethod.change_factors`) and all models
are adapters on the base, the factors of the change are known, and no matrix of the base is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.adapters.extract import ExtractionReport, write_change
from hf_transfer_ext.merging.arithmetic import kernels
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.planning.config import MergeConfig
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.merging.streaming.stream import StreamedPieces
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.dtypes import F32, Dtype
from hf_transfer_ext.weights.lora import LoraFactors
from hf_transfer_ext.weights.opened import AdaptedInput, InputModel, InputTensor, Scratch, StoredInput, open_model
from hf_transfer_ext.weights.reference import ModelReference
from hf_transfer_ext.weights.resume import work_of


@dataclass(frozen=True)
class MergedInput:
    """A tensor of the result, computed in float32 when it is read."""

    job: TensorJob
    seed: int
    check: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.job.shape

    @property
    def dtype(self) -> Dtype:
        return self.job.dtype

    @property
    def nbytes(self) -> int:
        return self.job.input_bytes

    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """Fill `out`, which must have the size of the whole tensor: some methods cannot merge parts of it."""
        job = self.job
        if start or out.numel() != job.numel:
            raise ValueError(f"Tensor {job.name!r} is merged as a whole: {job.numel} elements, got {out.numel()}.")
        if job.is_copy:
            job.models[0].read(0, out, scratch)
            return
        pieces = StreamedPieces(job, Scratch(), 0, job.numel, self.check, threading.Event())
        for place, piece in job.method.over(pieces, noise=Noise(self.seed, job.name), **job.options):
            merged = kernels.tensor_of(piece).reshape(-1)
            out[place : place + len(merged)] = merged


def write_adapter(
    config: MergeConfig,
    models: Mapping[ModelReference, InputModel],
    jobs: Sequence[TensorJob],
    out: str | Path,
    *,
    rank: int,
    content: Mapping[str, Any],
    files: Mapping[str, str],
    checkpoints: Sequence[Checkpoint],
    complete: Callable[[Path, ExtractionReport], None] | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> ExtractionReport:
    """Write the change from the base model to the result of the jobs as a PEFT LoRA folder, written atomically.

    The base is `base_model`; without one, the common base of the inputs, which must all be adapters.

    Args:
        jobs: All tensors of the result.
        content: What the result depends on, except the files of the models (`resume.work_of`).
        files: Name -> text of additional files in the folder.
        checkpoints: All checkpoints that the jobs read.
        complete: Called with the folder and the report before the folder is published.

    Raises:
        ValueError: There is no base, or the result has tensors or shapes that the base does not have.
    """
    if config.tokenizer is not None:
        raise ValueError(
            "A LoRA keeps the vocabulary of its base, so `tokenizer` and `output.lora` cannot be combined."
        )
    reference = config.base_model or _common_base(models)
    if reference in models and models[reference].adapted is not None:
        raise ValueError(f"`output.lora` needs a base model that is not an adapter itself, got {str(reference)!r}.")
    opened = None if reference in models else open_model(reference)
    start = opened or models[reference]
    try:
        tensors: dict[str, InputTensor] = {}
        for job in jobs:
            tensors[job.name] = known_result(job, start) or MergedInput(job, config.seed, not allow_nonfinite)
        result = ModelReference(f"the merge by {config.merge_method}")
        end = InputModel(result, start.folder, start.config, start.checkpoint, tensors)
        return write_change(
            start,
            end,
            out,
            rank=rank,
            dtype=(config.out_dtype or config.dtype or F32).torch,
            work=work_of({**content, "rank": rank}, [*start.opened, *checkpoints]),
            base_model=reference.path,
            revision=reference.revision,
            overwrite=overwrite,
            progress=progress,
            files=files,
            complete=complete,
        )
    finally:
        if opened is not None:
            opened.close()


def _common_base(models: Mapping[ModelReference, InputModel]) -> ModelReference:
    bases = {model.adapted for model in models.values()}
    base = next(iter(bases))
    if len(bases) > 1 or base is None:
        raise ValueError(
            "`output.lora` needs a base model for the adapter: set `base_model`, or merge only adapters of one model."
        )
    return base


def known_result(job: TensorJob, start: InputModel) -> InputTensor | None:
    """The tensor of the base if no input changed it, or with the factors of its change if these are known.

    The mean of equal numbers may differ from them in the last bit, so unchanged tensors must be detected here.
    """
    method, base = job.method, start.tensors.get(job.name)
    if base is None:
        return None
    weights = None if method.change_factors is None else method.change_factors(**job.options)
    if all(_is_same(tensor, base) for tensor in job.models):
        changes_only = weights is not None or method.base == "required"
        return base if changes_only or method.promises.give_back_equal(job.options) else None
    if weights is None:
        return None
    parts = []
    for weight, tensor in zip(weights, job.models, strict=True):
        if isinstance(tensor, AdaptedInput) and _is_same(tensor.inner, base):
            parts.append((weight, tensor.factors))
        elif not _is_same(tensor, base):
            return None
    left = torch.cat([factors.left * weight for weight, factors in parts], dim=1)
    return AdaptedInput(base, LoraFactors(left, torch.cat([factors.right for _, factors in parts], dim=0)))


def _is_same(one: InputTensor, other: InputTensor) -> bool:
    """Whether two inputs are the same bytes of the same file."""
    if not isinstance(one, StoredInput) or not isinstance(other, StoredInput):
        return False
    a, b = one.entry, other.entry
    return a.loaded is None and b.loaded is None and (a.file.resolve(), a.offset) == (b.file.resolve(), b.offset)
