"""Extract a LoRA adapter from a full fine-tune: what changed in each matrix, as a product of two thin ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.files import refuse_existing_output, sha256_of, write_text
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.inputs import InputsInBackground, Wanted
from hf_transfer_ext.hub.record import RunRecord, Stage
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.settings import QUIET, ForeignFlag, arguments_for
from hf_transfer_ext.weights.checkpoints import FLOAT_DTYPES
from hf_transfer_ext.weights.lora import LoraFactors, low_rank, save_lora, truncated
from hf_transfer_ext.weights.opened import AdaptedInput, InputModel, Scratch, open_model
from hf_transfer_ext.weights.reference import parse_reference
from hf_transfer_ext.weights.resume import Parts, key_of, resumable_folder

#: What the adapter leaves out, module by module, in its folder.
RESIDUALS_FILE = "residuals.json"


@dataclass(frozen=True)
class ModuleResidual:
    """What of a module's change the adapter does not hold.

    Args:
        rank: The module's own rank; smaller than the asked one where its matrix is.
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
    """

    folder: str
    rank: int
    modules: list[ModuleResidual]
    saved_modules: list[str]
    saved_biases: int
    residual_energy: float
    seconds: float

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
            "stored_whole": self.saved_modules,
        }


def extract_lora(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    rank: int,
    dtype: str | torch.dtype = "float32",
    base_name: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: bool = False,
) -> ExtractionReport:
    """Write a PEFT LoRA folder that turns `base` into (nearly) `finetuned`; it loads with `PeftModel.from_pretrained`.

    The change of each linear layer becomes the best product of rank `rank`, with alpha = r. Changed embeddings, norms
    and heads are stored whole (`modules_to_save`), as are changed biases (`bias: all`). One matrix is in memory at a
    time. A run that was killed leaves a hidden folder beside `out`; the same one started again goes on from there.

    Args:
        base: Folder or Hub id, `@revision` allowed, as in a merge configuration.
        finetuned: A model of the same architecture and shapes.
        out: Folder of the adapter; whole or absent.
        rank: At least 1. A matrix with fewer rows or columns gets all its ranks, through rank_pattern.
        dtype: Of the factors.
        base_name: `base_model_name_or_path` of the adapter, if it is not `base` (a local copy of a Hub model).
        overwrite: Replace an adapter that is there.
        allow_pickle: Accept `pytorch_model.bin`, loaded with `weights_only=True`.

    Raises:
        ValueError: The models do not fit each other or do not differ, or a change cannot be stored as an adapter.
    """
    if rank < 1:
        raise ValueError(f"`rank` has to be at least 1, got {rank}.")
    factor_dtype = getattr(torch, str(dtype).removeprefix("torch."), None)
    if factor_dtype not in FLOAT_DTYPES:
        raise ValueError(f"`dtype` has to be float32, bfloat16 or float16, got {dtype!r}.")
    refuse_existing_output(out, overwrite=overwrite)
    base_reference, tuned_reference = parse_reference(base, "base"), parse_reference(finetuned, "finetuned")
    settings = {"base": base, "finetuned": finetuned, "rank": rank, "dtype": dtype, "base_name": base_name}
    wanted: list[Wanted] = [(base_reference.path, base_reference.revision, "base")]
    if tuned_reference.lora is None:
        wanted.append((tuned_reference.path, tuned_reference.revision, "model"))
    else:
        wanted.append((tuned_reference.lora, tuned_reference.lora_revision, "model"))
    record = RunRecord("extraction", "hf-transfer-ext extract", settings, recipe_sha256=sha256_of(__file__))
    with ExitStack() as opened:
        start = open_model(base_reference, allow_pickle=allow_pickle)
        opened.callback(start.close)
        end = open_model(tuned_reference, allow_pickle=allow_pickle)
        opened.callback(end.close)
        inputs = opened.enter_context(InputsInBackground(wanted))

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
            dtype=factor_dtype,
            key=key_of({"rank": rank, "dtype": str(dtype), "base": base_name}, [*start.files, *end.files]),
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
    key: str,
    base_model: str,
    revision: str | None,
    overwrite: bool = False,
    progress: bool = False,
    files: Mapping[str, str] | None = None,
    complete: Callable[[Path, ExtractionReport], None] | None = None,
) -> ExtractionReport:
    """`extract_lora` for models that are open; `end` may be one that is calculated while it is read.

    Factors that a killed run of the same work has found are not calculated again.

    Args:
        key: Names the work (`merging.resume.key_of`).
        files: Name -> text of further files of the folder.
        complete: Called with the folder and the report before the folder is published.
    """
    began = time.perf_counter()
    with resumable_folder(refuse_existing_output(out, overwrite=overwrite), key, overwrite=overwrite) as folder:
        found = _Changes(start, end, Parts(folder / ".factors"))
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
        )
        total = sum(one.change**2 for one in found.residuals)
        lost = sum(one.residual_energy * one.change**2 for one in found.residuals)
        report = ExtractionReport(
            folder=str(out),
            rank=rank,
            modules=found.residuals,
            saved_modules=found.saved_modules,
            saved_biases=sum(
                name.endswith(".bias") and name.rpartition(".")[0] not in found.saved_modules
                for name in found.replaced
            ),
            residual_energy=lost / total,
            seconds=time.perf_counter() - began,
        )
        write_text(folder / RESIDUALS_FILE, json.dumps(report.residuals(), indent=2) + "\n")
        for name, text in (files or {}).items():
            write_text(folder / name, text)
        if complete is not None:
            complete(folder, report)
    return report


class _Changes:
    """Goes through the tensors of two models and sorts what changed by what an adapter can hold."""

    def __init__(self, start: InputModel, end: InputModel, parts: Parts) -> None:
        self.start, self.end, self.finished = start, end, parts
        self.model = _skeleton(start)
        self.parts = dict(self.model.named_modules())
        self.head = self.model.get_output_embeddings()
        self.scratch = Scratch()
        self.factors: dict[str, LoraFactors] = {}
        self.replaced: dict[str, Tensor] = {}
        self.saved_modules: list[str] = []
        self.residuals: list[ModuleResidual] = []
        self.transposed = any(type(part).__name__ == "Conv1D" for part in self.parts.values())

    def collect(self, rank: int, *, progress: bool) -> None:
        from tqdm import tqdm

        self._check_fit()
        for name in tqdm(self.start.tensors, desc="extracting", unit="tensor", disable=not progress):
            self._take(name, rank)
        if self.start.is_tied and self.model.get_input_embeddings() is not None:
            self._save_tied_head()
        if not self.factors:
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

    def target_modules(self) -> list[str]:
        """Endings like `q_proj` where all linear layers of that name changed, full names elsewhere."""
        linear = [name for name, part in self.parts.items() if self._is_linear(name, part)]
        targets = set()
        for name in self.factors:
            ending = name.rpartition(".")[2]
            alike = [other for other in self.parts if other.rpartition(".")[2] == ending]
            targets.add(ending if all(other in self.factors and other in linear for other in alike) else name)
        return sorted(targets)

    def _take(self, name: str, rank: int) -> None:
        own = self._own_name(name)
        owner, _, leaf = own.rpartition(".")
        part = self.parts[owner]
        is_factored = leaf == "weight" and self._is_linear(owner, part)
        after = self.end[name]
        if is_factored and isinstance(after, AdaptedInput) and after.inner is self.start[name]:
            self._keep(owner, *truncated(after.factors, rank))
            return
        earlier = self.finished.get(name) if is_factored else None
        if earlier is not None:
            norm, lost = earlier["norm_and_lost"].tolist()
            self._keep(owner, LoraFactors(earlier["left"], earlier["right"]), norm, lost)
            return
        change, tuned = self._change(name)
        if not bool(change.any()):
            return
        if is_factored:
            factors = low_rank(change, min(rank, *change.shape))
            norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
            lost = float(torch.linalg.vector_norm(change - factors.rows(0, len(change)), dtype=torch.float64))
            norms = torch.tensor([norm, lost], dtype=torch.float64)
            self.finished.put(name, {"left": factors.left, "right": factors.right, "norm_and_lost": norms})
            self._keep(owner, factors, norm, lost)
        elif leaf == "bias" and self._is_linear(owner, part):
            self.replaced[own] = tuned
        else:
            self._save_whole(owner, part, name)

    def _keep(self, owner: str, factors: LoraFactors, norm: float, lost: float) -> None:
        if norm > 0:
            self.factors[owner] = factors
            self.residuals.append(ModuleResidual(owner, factors.left.shape[1], norm, min(1.0, (lost / norm) ** 2)))

    def _save_whole(self, owner: str, part: Any, name: str) -> None:
        if owner in self.saved_modules:
            return
        if list(part.children()):
            raise ValueError(
                f"Tensor {name!r} changed, but it belongs to {owner!r} ({type(part).__name__}), which is neither a "
                "linear layer nor a simple module; an adapter cannot hold it. Keep the full fine-tune."
            )
        self.saved_modules.append(owner)
        prefix = name.rpartition(".")[0]
        for leaf, _ in part.named_parameters(recurse=False):
            self.replaced[f"{owner}.{leaf}"] = self._change(f"{prefix}.{leaf}")[1]

    def _save_tied_head(self) -> None:
        """A stored copy of tied embeddings is a copy of its own in PEFT, so the head needs the same one."""
        names = {id(part): name for name, part in self.parts.items()}
        embedding, head = names[id(self.model.get_input_embeddings())], names.get(id(self.head))
        if embedding in self.saved_modules and head is not None and head not in self.saved_modules:
            self.saved_modules.append(head)
            self.replaced[f"{head}.weight"] = self.replaced[f"{embedding}.weight"].clone()

    def _change(self, name: str) -> tuple[Tensor, Tensor]:
        """W_finetuned - W_base in float32, and W_finetuned in its own dtype."""
        before, after = self.start[name], self.end[name]
        if before.dtype not in FLOAT_DTYPES or after.dtype not in FLOAT_DTYPES:
            raise ValueError(f"Tensor {name!r} has dtype {after.dtype}; use models that are not quantised.")
        one, two = torch.empty(before.shape), torch.empty(after.shape)
        before.read(0, one.view(-1), self.scratch)
        after.read(0, two.view(-1), self.scratch)
        change = two - one
        if not torch.isfinite(change).all():
            raise ValueError(f"Tensor {name!r} holds NaN or infinity in one of the models. Mend the model first.")
        return change, two.to(after.dtype)

    def _check_fit(self) -> None:
        for name in [*self.start.tensors, *self.end.tensors]:
            shapes = self.start[name].shape, self.end[name].shape
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"Tensor {name!r} has shape {list(shapes[0])} in {str(self.start.reference)!r} and "
                    f"{list(shapes[1])} in {str(self.end.reference)!r}. An adapter needs one architecture and one "
                    "vocabulary."
                )
            self._own_name(name)

    def _is_linear(self, name: str, part: Any) -> bool:
        return part is not self.head and (isinstance(part, torch.nn.Linear) or type(part).__name__ == "Conv1D")

    def _own_name(self, name: str) -> str:
        """The tensor's name in the model; old files leave its first part out (`h.0` for `transformer.h.0`)."""
        for own in (name, f"{self.model.base_model_prefix}.{name}"):
            if own.rpartition(".")[0] in self.parts:
                return own
        raise ValueError(
            f"Tensor {name!r} of {str(self.start.reference)!r} belongs to no module of {type(self.model).__name__}."
        )


def _skeleton(model: InputModel) -> Any:
    """The model without weights, to know which tensor belongs to which kind of module."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(model.folder))
    names = config.architectures or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        raise ValueError(
            f"transformers {transformers.__version__} does not know the architecture {names} of "
            f"{str(model.reference)!r}, so the layers an adapter may change are unknown."
        )
    with torch.device("meta"):
        return architecture._from_config(config)


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
        extra=[QUIET],
        foreign=FOREIGN,
    )
    quiet = arguments.pop("quiet", False)
    report = extract_lora(**arguments, progress=not quiet)
    print(f"{report.folder}: rank {report.rank}, {len(report.modules)} modules in {report.seconds:.1f} s")
    print(f"share of the update's energy that is lost: {report.residual_energy:.2%}; most in")
    for one in sorted(report.modules, key=lambda one: -one.residual_energy)[:5]:
        print(f"  {one.module}  {one.residual_energy:.2%} at rank {one.rank}")
    if report.saved_modules or report.saved_biases:
        print(f"stored in full: {', '.join(report.saved_modules) or 'no module'}, {report.saved_biases} biases")
    return 0
