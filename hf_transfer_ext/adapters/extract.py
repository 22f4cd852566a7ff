"""Extract a LoRA adapter from a full fine-tune: what changed in each matrix, as a product of two thin ones."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.adapters.distance import squared_norms
from hf_transfer_ext.files import refuse_existing_output, sha256_of, write_text
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.inputs import InputsInBackground, Wanted, call_of
from hf_transfer_ext.hub.record import RunRecord, Stage
from hf_transfer_ext.hub.servable import serving
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.progress import steps
from hf_transfer_ext.settings import QUIET, ForeignFlag, arguments_for
from hf_transfer_ext.weights.architecture import Loading
from hf_transfer_ext.weights.dtypes import FLOAT_DTYPES, dtype_named
from hf_transfer_ext.weights.lora import LoraFactors, low_rank, save_lora, truncated
from hf_transfer_ext.weights.opened import (
    AdaptedInput,
    InputModel,
    Scratch,
    StoredInput,
    has_token_rows,
    is_buffer,
    open_model,
)
from hf_transfer_ext.weights.reference import parse_reference
from hf_transfer_ext.weights.resume import Parts, Work, resumable_folder, work_of

#: What the adapter leaves out, module by module, in its folder.
RESIDUALS_FILE = "residuals.json"


@dataclass(frozen=True)
class ModuleResidual:
    """The part of a module's change that the adapter does not represent.

    Args:
        module: Name of the module, or of the parameter where the experts of a layer are one.
        rank: The module's own rank; smaller than the requested one where its matrix is.
        change: Frobenius norm of W_finetuned - W_base.
        residual_energy: Share of the squared norm that is lost, 0 (nothing) to 1 (all).
    """

    module: str
    rank: int
    change: float
    residual_energy: float


@dataclass(frozen=True)
class ExtractionReport:
    """What an extraction wrote.

    Args:
        modules: The modules with LoRA factors, in the order of the model.
        saved_modules: Modules that are stored whole (embeddings, norms, head).
        saved_biases: Number of biases that are stored whole.
        residual_energy: Share of the squared norm of all matrices' changes that is lost.
        seconds: Wall time.
        saved_parameters: Parameters that are stored whole by themselves (A_log, class tokens), under their own names.
            PEFT loads them into the base model, as it does with trained biases.
        left_out: Parameters that changed and are not in the adapter -> norm of their change.
        notes: What a user of the adapter has to know; one sentence each.
    """

    folder: str
    rank: int
    modules: list[ModuleResidual]
    saved_modules: list[str]
    saved_biases: int
    residual_energy: float
    seconds: float
    saved_parameters: list[str] = field(default_factory=list)
    left_out: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def measurement(self) -> Measurement:
        """The lost share, for a card."""
        name = f"change left out at rank {self.rank}"
        return Measurement(name, self.residual_energy, "share of its energy", False, len(self.modules))

    def residuals(self) -> dict[str, Any]:
        """Plain JSON values for the adapter's folder: the whole share that is lost, and that of each module."""
        return {
            "rank": self.rank,
            "residual_energy": self.residual_energy,
            "modules": {
                one.module: {"rank": one.rank, "change": one.change, "residual_energy": one.residual_energy}
                for one in self.modules
            },
            "stored_whole": [*self.saved_modules, *self.saved_parameters],
            "left_out": self.left_out,
            "notes": self.notes,
        }


def extract_lora(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    rank: int,
    dtype: str | torch.dtype = "float32",
    base_name: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    modules_to_save: bool | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: bool = False,
) -> ExtractionReport:
    """Write a PEFT LoRA folder that turns `base` into (nearly) `finetuned`; it loads with `PeftModel.from_pretrained`.

    The change of each linear layer becomes the best product of rank `rank`, with alpha = r; that of fused experts one
    product for each expert (`target_parameters`). What changed beside them (embeddings, norms, biases, heads) of a
    causal language model is left out and reported, since the servers of such models load nothing but linear modules;
    `modules_to_save` keeps it. Of all other models, which no server adapts, it is kept. One parameter is in
    memory at a time, for fused experts all those of a layer. A run that was killed leaves a hidden folder beside
    `out`; the same one started again goes on from there.

    Args:
        base: Folder or Hub id, `@revision` allowed, as in a merge configuration.
        finetuned: A model of the same architecture and shapes.
        out: Folder of the adapter; written atomically.
        rank: At least 1. A matrix with fewer rows or columns gets all its ranks, through rank_pattern.
        dtype: Of the factors.
        base_name: `base_model_name_or_path` of the adapter, if it is not `base` (a local copy of a Hub model).
        include: Parts of names; only tensors with one of them go into the adapter. Empty: all.
        exclude: Parts of names; tensors with one of them do not. What changed and is left out is reported.
        modules_to_save: Store changed embeddings, norms, heads, biases and parameters of larger modules whole. PEFT
            loads such an adapter; vLLM and llama.cpp refuse it. None: for all but causal language models.
        overwrite: Replace an adapter that is there.
        allow_pickle: Accept `pytorch_model.bin`, loaded with `weights_only=True`.

    Raises:
        ValueError: The models do not fit each other or do not differ, or a change cannot be stored as an adapter.
    """
    if rank < 1:
        raise ValueError(f"`rank` has to be at least 1, got {rank}.")
    factor_dtype = dtype_named(dtype)
    if factor_dtype not in FLOAT_DTYPES:
        raise ValueError(f"`dtype` has to be float32, bfloat16 or float16, got {dtype!r}.")
    refuse_existing_output(out, overwrite=overwrite)
    base_reference, tuned_reference = parse_reference(base, "base"), parse_reference(finetuned, "finetuned")
    settings: dict[str, Any] = {"base": base, "finetuned": finetuned, "rank": rank, "dtype": dtype}
    settings |= {"base_name": base_name, "include": list(include), "exclude": list(exclude)}
    settings |= {"modules_to_save": modules_to_save}
    wanted: list[Wanted] = [(base_reference.path, base_reference.revision, "base")]
    if tuned_reference.lora is not None:
        wanted.append((tuned_reference.lora, tuned_reference.lora_revision, "model"))
    if (tuned_reference.path, tuned_reference.revision) != wanted[0][:2]:
        wanted.append((tuned_reference.path, tuned_reference.revision, "model"))
    record = RunRecord("extraction", "hf-transfer-ext extract", settings, recipe_sha256=sha256_of(__file__))
    record.call = call_of({**settings, "allow_pickle": allow_pickle}, wanted)
    with ExitStack() as opened:
        start = open_model(base_reference, allow_pickle=allow_pickle)
        opened.callback(start.close)
        end = open_model(tuned_reference, allow_pickle=allow_pickle)
        opened.callback(end.close)
        inputs = opened.enter_context(InputsInBackground(wanted))
        whole = task_type_of(end.architecture.model) != "CAUSAL_LM" if modules_to_save is None else modules_to_save

        def complete(folder: Path, report: ExtractionReport) -> None:
            record.stages.append(Stage("extract", round(report.seconds, 3)))
            record.metrics.append(report.measurement())
            inputs.put_into(record)
            finish_run(folder, record, quiet=True)

        return write_change(
            start,
            end,
            out,
            rank=rank,
            dtype=factor_dtype.torch,
            work=work_of(
                {
                    "rank": rank,
                    "dtype": str(dtype),
                    "base": base_name,
                    "include": list(include),
                    "exclude": list(exclude),
                    "modules_to_save": whole,
                },
                [*start.opened, *end.opened],
            ),
            include=include,
            exclude=exclude,
            keep_whole=whole,
            base_model=base_name or base_reference.path,
            revision=base_reference.revision,
            overwrite=overwrite,
            progress=progress,
            complete=complete,
        )


def write_change(
    start: InputModel,
    end: InputModel,
    out: str | Path,
    *,
    rank: int,
    dtype: torch.dtype,
    work: Work,
    base_model: str,
    revision: str | None,
    overwrite: bool = False,
    progress: bool = False,
    files: Mapping[str, str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep_whole: bool = True,
    complete: Callable[[Path, ExtractionReport], None] | None = None,
) -> ExtractionReport:
    """`extract_lora` for models that are open; `end` may be one that is calculated while it is read.

    Factors that a killed run of the same work has found are not calculated again.

    Args:
        work: What the result depends on (`resume.work_of`).
        files: Name -> text of further files of the folder.
        keep_whole: Store what changed beside linear layers and experts; without it, that is left out and reported.
        complete: Called with the folder and the report before the folder is published.
    """
    began = time.perf_counter()
    with resumable_folder(Path(out), work, overwrite=overwrite) as folder:
        found = _Changes(start, end, Parts(folder / ".factors"), include, exclude, keep_whole)
        found.collect(rank, progress=progress)
        save_lora(
            folder,
            found.factors,
            base_model=base_model,
            revision=revision,
            target_modules=found.target_modules(),
            rank=rank,
            replaced=found.replaced,
            modules_to_save=found.saved_modules,
            fan_in_fan_out=found.transposed,
            dtype=dtype,
            task_type=found.task_type,
            architecture=found.architecture,
            stacks=found.stacks,
        )
        total = sum(one.change**2 for one in found.residuals)
        lost = sum(one.residual_energy * one.change**2 for one in found.residuals)
        report = ExtractionReport(
            folder=str(out),
            rank=rank,
            modules=found.residuals,
            saved_modules=found.saved_modules,
            saved_biases=found.saved_biases,
            residual_energy=lost / total,
            seconds=time.perf_counter() - began,
            saved_parameters=found.saved_parameters,
            left_out=found.left_out,
            notes=found.notes,
        )
        write_text(folder / RESIDUALS_FILE, json.dumps(report.residuals(), indent=2) + "\n")
        for name, text in (files or {}).items():
            write_text(folder / name, text)
        if complete is not None:
            complete(folder, report)
    return report


class _Changes:
    """Goes through the parameters of two models and sorts what changed by what an adapter can hold.

    Changes are calculated on the stored tensors and then converted to the parameters of the modules, by the
    conversions with which transformers loads the model.
    """

    def __init__(
        self,
        start: InputModel,
        end: InputModel,
        parts: Parts,
        include: Sequence[str],
        exclude: Sequence[str],
        keep_whole: bool,
    ) -> None:
        self.start, self.end, self.finished = start, end, parts
        self.include, self.exclude, self.keep_whole = include, exclude, keep_whole
        self.architecture = end.architecture
        self.model, self.parts = self.architecture.model, self.architecture.modules
        self.head = self.model.get_output_embeddings()
        self.scratch = Scratch()
        self.factors: dict[str, LoraFactors] = {}
        self.stacks: dict[str, list[LoraFactors]] = {}
        self.replaced: dict[str, Tensor] = {}
        self.saved_modules: list[str] = []
        self.residuals: list[ModuleResidual] = []
        self.left_out: dict[str, float] = {}
        #: Of these, the parameters that only `keep_whole` would keep.
        self.not_low_rank: list[str] = []
        self.notes: list[str] = []
        self.task_type = task_type_of(self.model)
        self.transposed = any(type(part).__name__ == "Conv1D" for part in self.parts.values())
        self._before, self._after = self._loadings(start), self._loadings(end)
        self._loaded: dict[str, tuple[Tensor, Tensor]] = {}

    def collect(self, rank: int, *, progress: bool) -> None:
        for parameter in steps(list(self._after), "extracting", "tensor", show=progress):
            self._take(parameter, rank)
        self._save_tied()
        self._save_further()
        self._note_unloaded()
        self._note_left_out()
        if not self.factors and not self.stacks:
            raise ValueError(
                f"No linear layer differs between {str(self.start.reference)!r} and {str(self.end.reference)!r}, so "
                "there is nothing to extract."
            )

    @property
    def saved_biases(self) -> int:
        """Number of biases stored by themselves, and not within a module."""
        return sum(
            name.endswith(".bias") and name.rpartition(".")[0] not in self.saved_modules for name in self.replaced
        )

    @property
    def saved_parameters(self) -> list[str]:
        """Parameters stored by themselves that are neither biases nor parts of a stored module."""
        return [
            name
            for name in self.replaced
            if not name.endswith(".bias") and name.rpartition(".")[0] not in self.saved_modules
        ]

    def target_modules(self) -> list[str]:
        """Endings like `q_proj` where all linear layers of that name changed, full names elsewhere."""
        linear = {name for name, part in self.parts.items() if self._is_linear(name, part)}
        targets = set()
        for name in self.factors:
            ending = name.rpartition(".")[2]
            alike = [other for other in self.parts if other.rpartition(".")[2] == ending]
            targets.add(ending if all(other in self.factors and other in linear for other in alike) else name)
        return sorted(targets)

    def _loadings(self, model: InputModel) -> dict[str, Loading]:
        """Parameter -> the tensors of a model that it is loaded from, in the architecture of the fine-tune."""
        shapes = {name: tensor.shape for name, tensor in model.tensors.items() if not is_buffer(name, tensor)}
        found: dict[str, Loading] = {}
        for loading in self.architecture.loadings(shapes):
            for parameter in loading.parameters:
                found[parameter] = loading
        for target in self.architecture.tied:
            # The other way round where only the second of two tied tensors is stored.
            source = self.architecture.tied[target]
            if source not in found and target in found:
                found[source] = found[target]
        return found

    def _is_wanted(self, parameter: str) -> bool:
        names = {parameter, *(self._after[parameter].sources if parameter in self._after else ())}
        if any(one in name for one in self.exclude for name in names):
            return False
        return not self.include or any(one in name for one in self.include for name in names)

    def _take(self, parameter: str, rank: int) -> None:
        if parameter not in self.architecture.state or self._is_stored_elsewhere(parameter):
            return
        owner, _, leaf = parameter.rpartition(".")
        part = self.parts[owner]
        loading = self._after[parameter]
        before = self._before.get(parameter) or self._tied_loading(self._before, parameter)
        wanted = self._is_wanted(parameter)
        # A head of its own where the base's is its embeddings: another model without it, so it is never left out.
        is_own_head = part is self.head and before is not None and parameter not in self._before
        keep_whole = self.keep_whole or is_own_head
        is_factored = leaf == "weight" and self._is_linear(owner, part)
        if wanted and is_factored and before is not None and loading.converter is None:
            after = self.end.tensors[loading.sources[0]]
            if isinstance(after, AdaptedInput) and after.inner is self.start.tensors.get(before.sources[0]):
                self._keep(owner, *truncated(after.factors, rank))
                return
        earlier = self.finished.get(parameter) if is_factored and wanted else None
        if earlier is not None:
            norm, lost = earlier["norm_and_lost"].tolist()
            self._keep(owner, LoraFactors(earlier["left"], earlier["right"]), norm, lost)
            return
        if not is_factored and not (wanted and keep_whole) and leaf in ("weight", "bias"):
            distance = self._streamed_distance(loading, before)
            if distance is not None:
                self._leave_out(parameter, distance, low_rank=not wanted)
                return
        change, tuned = self._change(parameter)
        if change is not None and float(change.sum()) == 0 and not bool(change.any()):
            return
        if wanted and before is None and any(piece.isdigit() for piece in parameter.split(".")):
            raise ValueError(
                f"Tensor {parameter!r} of {str(self.end.reference)!r} is in a layer that "
                f"{str(self.start.reference)!r} lacks. An adapter needs one architecture."
            )
        is_stack = change is not None and change.dim() == 3 and not _has_parts(part) and leaf != "weight"
        held = is_stack or (is_factored and change is not None)
        if not wanted or not (held or keep_whole):
            norm = float(torch.linalg.vector_norm(tuned.float() if change is None else change, dtype=torch.float64))
            self._leave_out(parameter, norm, low_rank=held or not wanted)
        elif change is None:  # the base has no such tensor, or one of another vocabulary
            self._save_new(parameter, owner, part, tuned)
        elif is_factored:
            factors, norm, lost = _decomposed(change, rank)
            norms = torch.tensor([norm, lost], dtype=torch.float64)
            self.finished.put(parameter, {"left": factors.left, "right": factors.right, "norm_and_lost": norms})
            self._keep(owner, factors, norm, lost)
        elif is_stack:
            self._keep_stack(parameter, change, rank, bool(getattr(part, "is_transposed", False)))
        elif leaf == "bias" and self._is_linear(owner, part):
            self.replaced[parameter] = tuned
        elif _has_parts(part) or self._holds_others(part) or not owner or self._is_read_past(owner):
            self.replaced[parameter] = tuned
        else:
            self._save_whole(owner, part)

    def _leave_out(self, parameter: str, distance: float, *, low_rank: bool) -> None:
        if distance > 0:
            self.left_out[parameter] = distance
            if not low_rank:
                self.not_low_rank.append(parameter)

    def _streamed_distance(self, after: Loading, before: Loading | None) -> float | None:
        """Norm of the change of a tensor that is loaded as it is stored, without it in memory; None for any other.

        NaN and infinity are left to the usual way, which refuses them.
        """
        if before is None or after.converter is not None or before.converter is not None:
            return None
        one, other = self.start.tensors[before.sources[0]], self.end.tensors[after.sources[0]]
        if one.shape != other.shape or not {one.dtype, other.dtype} <= set(FLOAT_DTYPES):
            return None
        squared, _ = squared_norms(one, other)
        return math.sqrt(squared) if math.isfinite(squared) else None

    def _holds_others(self, part: Any) -> bool:
        """Whether a module is more than weight, bias and the statistics of a normalization."""
        return any(leaf not in ("weight", "bias") for leaf, _ in part.named_parameters(recurse=False))

    def _is_stored_elsewhere(self, parameter: str) -> bool:
        """Whether a parameter shares its tensor, by the config and in the file of the fine-tune, with another one."""
        source = self.architecture.tied.get(parameter)
        return source is not None and self._after.get(source) is self._after[parameter]

    def _tied_loading(self, loadings: dict[str, Loading], parameter: str) -> Loading | None:
        for one in sorted(self.architecture.ties_of(parameter)):
            if one in loadings:
                return loadings[one]
        return None

    def _keep(self, owner: str, factors: LoraFactors, norm: float, lost: float) -> None:
        if norm > 0:
            self.factors[owner] = factors
            self.residuals.append(ModuleResidual(owner, factors.left.shape[1], norm, min(1.0, (lost / norm) ** 2)))

    def _keep_stack(self, parameter: str, change: Tensor, rank: int, transposed: bool) -> None:
        """The matrices of all experts, each cut to the rank; `target_parameters` of PEFT has one rank for all."""
        own = min(rank, *change.shape[1:])
        found = [_decomposed(one, own) for one in change]
        self.stacks[parameter] = [factors for factors, _, _ in found]
        norm = sum(one**2 for _, one, _ in found) ** 0.5
        lost = sum(one**2 for _, _, one in found) ** 0.5
        self.residuals.append(ModuleResidual(parameter, own, norm, min(1.0, (lost / norm) ** 2)))

    def _save_whole(self, owner: str, part: Any) -> None:
        if owner in self.saved_modules:
            return
        self.saved_modules.append(owner)
        for leaf in part.state_dict():
            name = f"{owner}.{leaf}"
            if leaf in dict(part.named_parameters(recurse=False)) or name in self._after:
                self.replaced[name] = self._change(name)[1]
            else:  # a counter, which is not trained
                self.replaced[name] = self._stored_buffer(name)

    def _stored_buffer(self, name: str) -> Tensor:
        for model in (self.end, self.start):
            for stored, parameter in self.architecture.parameters_of(model.tensors).items():
                tensor = model.tensors[stored]
                if parameter == name and isinstance(tensor, StoredInput):
                    return tensor.checkpoint.read(tensor.entry.name)
        raise ValueError(f"Buffer {name!r} of a changed module is in neither model, so the module cannot be stored.")

    def _save_new(self, parameter: str, owner: str, part: Any, tuned: Tensor) -> None:
        """A tensor that the base lacks (a new head), or whose rows are those of a larger vocabulary."""
        before = self._before.get(parameter)
        if before is not None:
            rows = tuned.shape[0]
            self.notes.append(
                f"{parameter} has {rows} rows, more or less than the base: resize the base before the adapter is "
                f"loaded, with model.resize_token_embeddings({rows})."
            )
        else:
            self.notes.append(f"{parameter} is not in the base model and is stored whole.")
        if _has_parts(part):
            self.replaced[parameter] = tuned
        else:
            self._save_whole(owner, part)

    def _save_tied(self) -> None:
        """Every module that shares the tensor of a stored one is a module of its own in PEFT and needs it."""
        for name in list(self.replaced):
            for other in sorted(self.architecture.ties_of(name) - {name}):
                owner = other.rpartition(".")[0]
                if other in self.replaced or owner not in self.parts:
                    continue
                own = self._after.get(other)
                if own is not None and own is not self._after.get(name):
                    continue  # the fine-tune has a tensor of its own there, which was looked at by itself
                self.replaced[other] = self.replaced[name].clone()
                for leaf_ in self.parts[owner].state_dict():
                    if f"{owner}.{leaf_}" not in self.replaced:
                        self.replaced[f"{owner}.{leaf_}"] = self._change(f"{owner}.{leaf_}")[1]
                if owner not in self.saved_modules:
                    self.saved_modules.append(owner)

    def _save_further(self) -> None:
        """PEFT also wraps modules whose names end like those to save, and the heads of some tasks."""
        heads = _TASK_HEADS.get(self.task_type or "", ())
        while True:
            wrapped = [
                name
                for name, part in self.parts.items()
                if name and name not in self.saved_modules and name.endswith((*heads, *self.saved_modules))
            ]
            wrapped = [name for name in wrapped if self.parts[name].state_dict()]
            if not wrapped:
                return
            for name in wrapped:
                self.saved_modules.append(name)
                if self.factors.pop(name, None) is not None:
                    self.residuals = [one for one in self.residuals if one.module != name]
                for leaf in self.parts[name].state_dict():
                    parameter = f"{name}.{leaf}"
                    if parameter not in self.replaced:
                        self.replaced[parameter] = (
                            self._change(parameter)[1] if self._has(parameter) else self._stored_buffer(parameter)
                        )

    def _has(self, parameter: str) -> bool:
        return self._tied_loading(self._after, parameter) is not None

    def _note_unloaded(self) -> None:
        """Tensors that transformers does not load into the fine-tune's architecture are told, if they differ."""
        for model, loadings in ((self.start, self._before), (self.end, self._after)):
            used = {source for loading in loadings.values() for source in loading.sources}
            rest = [name for name, tensor in model.tensors.items() if name not in used and not is_buffer(name, tensor)]
            if model is self.end:
                self._refuse_further_layers(rest, used)
            if rest:
                self.notes.append(
                    f"{len(rest)} tensors of {str(model.reference)!r} are not loaded by {type(self.model).__name__} "
                    f"and are left out: {', '.join(rest[:5])}{' ...' if len(rest) > 5 else ''}."
                )

    def _note_left_out(self) -> None:
        if not self.not_low_rank:
            return
        lost = sum(self.left_out[name] ** 2 for name in self.not_low_rank)
        whole = lost + sum(one.change**2 for one in self.residuals)
        first = ", ".join(self.not_low_rank[:3]) + (" ..." if len(self.not_low_rank) > 3 else "")
        self.notes.append(
            f"{len(self.not_low_rank)} changed parameters beside the linear layers are left out ({first}), with "
            f"{lost / whole:.2%} of the energy of the whole update. --modules-to-save keeps them, for PEFT alone: "
            "vLLM and llama.cpp refuse such an adapter."
        )

    def _refuse_further_layers(self, unloaded: Sequence[str], loaded: set[str]) -> None:
        """Refuse layers that the base has no place for; those that transformers ignores are left out."""
        ignored = [re.compile(one) for one in self.model._keys_to_ignore_on_load_unexpected or ()]
        stacks = {_FIRST_NUMBER.split(name)[0] for name in loaded}
        for name in unloaded:
            is_layer = name not in self.start.tensors and _FIRST_NUMBER.search(name) is not None
            if is_layer and _FIRST_NUMBER.split(name)[0] in stacks and not any(one.search(name) for one in ignored):
                raise ValueError(
                    f"Tensor {name!r} of {str(self.end.reference)!r} is in a layer that "
                    f"{str(self.start.reference)!r} lacks. An adapter needs one architecture."
                )

    def _read(self, model: InputModel, names: Sequence[str]) -> list[Tensor]:
        tensors = []
        for name in names:
            tensor = model.tensors[name]
            if tensor.dtype not in FLOAT_DTYPES:
                raise ValueError(f"Tensor {name!r} has dtype {tensor.dtype}; use models that are not quantized.")
            out = torch.empty(tensor.shape)
            tensor.read(0, out.view(-1), self.scratch)
            tensors.append(out)
        return tensors

    def _change(self, parameter: str) -> tuple[Tensor | None, Tensor]:
        """W_finetuned - W_base in float32, None where the base has no such W; and W_finetuned in its dtype."""
        loading = self._after.get(parameter) or self._tied_loading(self._after, parameter)
        before = self._before.get(parameter) or self._tied_loading(self._before, parameter)
        if loading is None:
            raise ValueError(f"{str(self.end.reference)!r} has no tensor for {parameter!r}.")
        after = self._converted(self.end, loading, parameter)
        dtype = self.end.tensors[loading.sources[0]].dtype.torch
        if before is None:
            self._require_finite(after, (self.end, loading))
            return None, after.to(dtype)
        one = self._converted(self.start, before, parameter)
        if one.shape != after.shape:
            if has_token_rows(parameter) and one.shape[1:] == after.shape[1:]:
                self._require_finite(after, (self.end, loading))
                return None, after.to(dtype)
            raise ValueError(
                f"Tensor {parameter!r} has shape {list(one.shape)} in {str(self.start.reference)!r} and "
                f"{list(after.shape)} in {str(self.end.reference)!r}. An adapter needs one architecture."
            )
        change = after - one
        self._require_finite(change, (self.start, before), (self.end, loading))
        return change, after.to(dtype)

    def _require_finite(self, result: Tensor, *inputs: tuple[InputModel, Loading]) -> None:
        """Refuse inputs that hold NaN or infinity; the sum of the result shows whether to look."""
        if math.isfinite(float(result.sum())):
            return
        for model, loading in inputs:
            for name, values in zip(loading.sources, self._read(model, loading.sources), strict=True):
                if not torch.isfinite(values).all():
                    raise ValueError(
                        f"Tensor {name!r} of {str(model.reference)!r} holds NaN or infinity. Fix the model."
                    )

    def _converted(self, model: InputModel, loading: Loading, parameter: str) -> Tensor:
        made = self.architecture.convert(loading, self._read(model, loading.sources))
        return made[parameter] if parameter in made else made[loading.parameters[0]]

    def _is_read_past(self, name: str) -> bool:
        return self.model.config.model_type in _WITHOUT_LORA_ON_OUTPUT and name.endswith(".out_proj")

    def _is_linear(self, name: str, part: Any) -> bool:
        if self._is_read_past(name):
            return False
        return part is not self.head and (isinstance(part, torch.nn.Linear) or type(part).__name__ == "Conv1D")


#: Models that read the weight of `out_proj` past the module, so that PEFT refuses a LoRA on it.
_WITHOUT_LORA_ON_OUTPUT = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def _has_parts(part: Any) -> bool:
    """Whether a module has modules with parameters; an activation does not count."""
    return any(child.state_dict() for child in part.children())


def _decomposed(change: Tensor, rank: int) -> tuple[LoraFactors, float, float]:
    """Factors of a change, its Frobenius norm, and that of what the factors leave out."""
    factors = low_rank(change, min(rank, *change.shape))
    norm = _norm(change)
    held = sum(((factors.left**2).sum(0).double() * (factors.right**2).sum(1).double()).tolist())
    # The factors' columns are orthogonal, so what they hold subtracts from the whole; where next to nothing is left,
    # rounding would be all of the difference.
    if norm**2 - held > 1e-3 * norm**2:
        return factors, norm, math.sqrt(norm**2 - held)
    return factors, norm, _norm(change - factors.rows(0, len(change)))


def _norm(values: Tensor) -> float:
    """Frobenius norm: sums of float32, short enough to be exact to six digits, added in float64."""
    squared = sum(float(part.dot(part)) for part in values.reshape(-1).split(1 << 14))
    if math.isfinite(squared):
        return math.sqrt(squared)
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


#: The number of the layer in the name of a tensor.
_FIRST_NUMBER = re.compile(r"\.\d+\.")

#: Endings of the names of architectures -> the task that PEFT has for them.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

#: Modules that PEFT stores with every adapter of a task.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_type_of(model: Any) -> str | None:
    """The `task_type` with which PEFT wraps a model; None where its plain wrapper is right (images, sound, masks).

    PEFT's wrappers for tasks pass `input_ids` on and need the methods of text generation.
    """
    name = type(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    for ending, task in _TASKS.items():
        if name.endswith(ending):
            return task if task != "CAUSAL_LM" or hasattr(model, "prepare_inputs_for_generation") else None
    if name.endswith("ForConditionalGeneration") and getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return None


#: Flags of mergekit-extract-lora.
FOREIGN = {
    "max-rank": ForeignFlag(lambda text: {"rank": text}, takes_value=True),
    "cuda": ForeignFlag(refused="an extraction runs on the CPU, one matrix at a time. Leave it out."),
    "distribute-scale": ForeignFlag(note="the factors share the scale already (alpha equals the rank)."),
    "lazy-unpickle": ForeignFlag(note="tensors are always read lazily; pickles need --allow-pickle."),
    "trust-remote-code": ForeignFlag(refused="no code of a repository is run, and none is needed. Leave it out."),
}


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext extract BASE FINETUNED OUT --rank R`."""
    arguments = arguments_for(
        extract_lora,
        argv,
        program="hf-transfer-ext extract",
        about="Extract a LoRA adapter from a full fine-tune, for PeftModel.from_pretrained(base, OUT).",
        hidden=["progress"],
        extra=[QUIET, *PUSH_OPTIONS],
        foreign=FOREIGN,
    )
    quiet, publication = arguments.pop("quiet", False), Publication.taken_from(arguments)
    print_report(extract_lora(**arguments, progress=not quiet))
    publication.publish(arguments["out"])
    return 0


def print_report(report: ExtractionReport) -> None:
    """What a command that wrote an adapter prints of it."""
    print(f"{report.folder}: rank {report.rank}, {len(report.modules)} modules in {report.seconds:.1f} s")
    print(f"share of the update's energy that is lost: {report.residual_energy:.2%}; most in")
    for one in sorted(report.modules, key=lambda one: -one.residual_energy)[:5]:
        print(f"  {one.module}  {one.residual_energy:.2%} at rank {one.rank}")
    if report.saved_modules or report.saved_biases:
        print(f"stored in full: {', '.join(report.saved_modules) or 'no module'}, {report.saved_biases} biases")
    if report.saved_parameters:
        print(f"stored by themselves: {', '.join(report.saved_parameters)}")
    for name, norm in sorted(report.left_out.items(), key=lambda one: -one[1])[:5]:
        print(f"left out: {name}, whose change has norm {norm:.4g}")
    if len(report.left_out) > 5:
        print(f"left out: {len(report.left_out) - 5} more; {RESIDUALS_FILE} names them")
    for note in report.notes:
        print(f"note: {note}")
    print("\n".join(serving(report.folder)))
