"""Models opened for merging or extraction: tensors by name, read in pieces as float32."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from hf_transfer_ext.reading import field_of, read_json
from hf_transfer_ext.weights.checkpoints import Checkpoint, StoredTensor, bytes_of, unknown_tensor
from hf_transfer_ext.weights.devices import on_host
from hf_transfer_ext.weights.dtypes import BOOL, F32, FLOAT_DTYPES, I16, I32, I64, Dtype
from hf_transfer_ext.weights.lora import LoraAdapter, LoraFactors, expert_factors, read_lora
from hf_transfer_ext.weights.reference import ModelReference
from hf_transfer_ext.weights.repository import base_of_adapter, local_folder

if TYPE_CHECKING:
    from torch import Tensor

    from hf_transfer_ext.weights.architecture import Architecture, Loading

#: Float buffers that old checkpoints store: rotary frequencies, and attention masks and their fill values.
_FLOAT_BUFFER = re.compile(r"(^|\.)(\w*inv_freq|(attn|attention|self_attn)\.(masked_bias|bias))$")

#: Integers and booleans, which are never trained.
_WHOLE_DTYPES = (I64, I32, I16, BOOL)

#: Tensors with one entry for each token: input embeddings, and the heads that may share their matrix.
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens(_per_layer)?|lm_head|wte|word_embeddings|embed_in|embed_out|tok_embeddings|tokens_embed|shared"
    r"|embeddings|(predictions|lm_head)\.decoder)\.weight$"
)


def has_token_rows(name: str) -> bool:
    """Whether a tensor has one row for each token, by its name."""
    return _VOCABULARY.search(name) is not None


def is_buffer(name: str, tensor: InputTensor) -> bool:
    """Whether a stored tensor is a buffer that cannot be merged: counters, positions, masks, rotary frequencies."""
    if tensor.dtype in _WHOLE_DTYPES:
        return True
    found = _FLOAT_BUFFER.search(name)
    if found is None or found[0].endswith("inv_freq"):
        return found is not None
    return tensor.shape in ((), (1,)) or (len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1))


#: What follows a weight's name in the name of the scales that it is stored with.
SCALES = ("_scale", "_scale_inv", ".absmax")


class Scratch:
    """Buffers of one thread, allocated once and reused for every piece.

    Args:
        device: Where the methods compute (`devices.resolve_device`). Bytes are read into memory of the host, which is
            pinned for a GPU.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._raw: dict[Hashable, np.ndarray] = {}
        self._floats: dict[int, Tensor] = {}

    def raw(self, nbytes: int, slot: Hashable = 0) -> np.ndarray:
        """The buffer of bytes with the name `slot`."""
        buffer = self._raw.get(slot)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._raw[slot] = np.empty(nbytes, np.uint8) if self.device == "cpu" else _pinned(nbytes)
        return buffer[:nbytes]

    def floats(self, slot: int, count: int) -> Tensor:
        """The float32 buffer number `slot`."""
        buffer = self._floats.get(slot)
        if buffer is None or len(buffer) < count:
            import torch

            buffer = self._floats[slot] = torch.empty(count, dtype=torch.float32, device=self.device)
        return buffer[:count]


def _pinned(nbytes: int) -> np.ndarray:
    import torch

    buffer: np.ndarray = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return buffer


@runtime_checkable
class InputTensor(Protocol):
    """A tensor of one model: stored in a file, or computed when it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def nbytes(self) -> int: ...
    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """Fill `out` (flat, float32, on any device) with the elements from `start` on."""
        ...


@dataclass(frozen=True)
class StoredInput:
    """A tensor that is stored in a file."""

    checkpoint: Checkpoint
    entry: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> Dtype:
        return self.entry.dtype

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        size = self.dtype.itemsize
        if self.dtype == F32 and on_host(out):
            self.checkpoint.read_bytes(self.entry, start * size, bytes_of(out))
            return
        import torch

        stored = torch.from_numpy(self.stored(start, out.numel(), scratch)).view(self.dtype.torch)
        out.copy_(stored.to(out.device))  # converted there: fewer bytes travel

    def stored(self, start: int, count: int, scratch: Scratch, slot: Hashable = 0) -> np.ndarray:
        """Elements as stored in the file (`Dtype.numpy`), in the buffer `slot` of the scratch memory."""
        return self.stored_runs([start], count, scratch, slot)

    def stored_runs(self, starts: Sequence[int], count: int, scratch: Scratch, slot: Hashable = 0) -> np.ndarray:
        """Several runs of elements as stored in the file, one after the other in the buffer `slot`."""
        size = self.dtype.itemsize
        raw = scratch.raw(len(starts) * count * size, slot)
        view = memoryview(raw)  # type: ignore[arg-type]
        for i, start in enumerate(starts):
            self.checkpoint.read_bytes(self.entry, start * size, view[i * count * size : (i + 1) * count * size])
        return raw.view(self.dtype.numpy)


class DerivedInput:
    """A tensor that is computed from another one, with its shape and dtype."""

    inner: InputTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> Dtype:
        return self.inner.dtype

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes


@dataclass(frozen=True)
class AdaptedInput(DerivedInput):
    """A matrix of a model with the change of a LoRA adapter added, row by row: W + scale * B A."""

    inner: InputTensor
    factors: LoraFactors

    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        self.inner.read(start, out, scratch)
        columns = self.shape[1]
        first, last = start // columns, -(-(start + out.numel()) // columns)
        change = self.factors.rows(first, last).reshape(-1)
        out += change[start - first * columns :][: out.numel()].to(out.device)


@dataclass(frozen=True)
class StackedAdaptedInput(DerivedInput):
    """A stack of matrices (the experts of a layer) with a low-rank change added to each matrix.

    Args:
        factors: One pair for each matrix of the stack, in the layout of the stack.
    """

    inner: InputTensor
    factors: tuple[LoraFactors, ...]

    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        self.inner.read(start, out, scratch)
        size = self.shape[-2] * self.shape[-1]
        for number in range(start // size, -(-(start + out.numel()) // size)):
            first, last = max(start, number * size), min(start + out.numel(), (number + 1) * size)
            top, bottom = (first - number * size) // self.shape[-1], -(-(last - number * size) // self.shape[-1])
            change = self.factors[number].rows(top, bottom).reshape(-1)
            skipped = first - number * size - top * self.shape[-1]
            out[first - start : last - start] += change[skipped:][: last - first].to(out.device)


@dataclass
class InputModel:
    """An opened model.

    Args:
        reference: How the configuration refers to it.
        folder: The folder of its files.
        config: Its config.json, updated if an adapter unties head and embeddings.
        adapted: The base model if this one is an adapter, else None.
        copies: Stored copies of tied tensors, which are omitted: name -> the tensor that transformers loads.
    """

    reference: ModelReference
    folder: Path
    config: dict[str, Any]
    checkpoint: Checkpoint
    tensors: dict[str, InputTensor]
    opened: list[Checkpoint] = field(default_factory=list)
    adapted: ModelReference | None = None
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """All files that the tensors are read from."""
        return sorted({entry.file for one in self.opened for entry in one.entries.values()})

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        return self.config.get("text_config", self.config)

    @property
    def is_tied(self) -> bool:
        """Whether the config says that the head shares the matrix of the input embeddings.

        A stored head that differs from the embeddings counts all the same, as in transformers. Where config.json
        leaves the key out, the head is tied if none is stored.
        """
        for part in (self.config, self.text_config):
            if part.get("tie_word_embeddings") is not None:
                return bool(part["tie_word_embeddings"])
        return not self.has_head

    @property
    def has_head(self) -> bool:
        """Whether a head is stored that is not a copy of the embeddings."""
        return any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in self.tensors)

    @cached_property
    def architecture(self) -> Architecture:
        """The model of transformers that its config.json describes, without weights."""
        from hf_transfer_ext.weights.architecture import Architecture

        return Architecture(self.folder)

    @cached_property
    def parts(self) -> set[str]:
        """The parts of all names of tensors, between their dots."""
        return {part for name in self.tensors for part in name.split(".")}

    @cached_property
    def unloaded(self) -> set[str]:
        """Tensors that transformers does not load (of multi-token prediction); empty for architectures it lacks."""
        try:
            return set(self.tensors) - self.architecture.loaded(self.tensors)
        except ValueError:
            return set()

    @cached_property
    def loadings(self) -> dict[str, Loading]:
        """Parameter of the architecture -> how transformers makes it from the tensors of the file."""
        shapes = {name: entry.shape for name, entry in self.checkpoint.entries.items()}
        return {parameter: one for one in self.architecture.loadings(shapes) for parameter in one.parameters}

    def stored_for(self, name: str) -> str | None:
        """The tensor that transformers takes for the tensor `name` of a module; None where it takes no single one."""
        if name in self.tensors:
            return name
        if name in self.copies:
            return self.copies[name]
        if name.endswith("lm_head.weight") and self.is_tied:  # by far the most common case, without transformers
            embeddings = [other for other in self.tensors if other.endswith("embed_tokens.weight")]
            if len(embeddings) == 1:
                return embeddings[0]
        parameter = self.architecture.parameter_of(name)
        if parameter is None:
            return None
        for one in (parameter, *sorted(self.architecture.ties_of(parameter))):
            loading = self.loadings.get(one)
            if loading is not None and loading.converter is None:
                stored = self.copies.get(loading.sources[0], loading.sources[0])
                if stored in self.tensors:
                    return stored
        return None

    def __getitem__(self, name: str) -> InputTensor:
        if name in self.tensors:
            return self.tensors[name]
        try:
            stored = self.stored_for(name)
        except ValueError:  # an architecture that transformers does not know: names have to be equal
            stored = None
        if stored is not None:
            return self.tensors[stored]
        raise ValueError(
            f"Model {str(self.reference)!r}: {unknown_tensor(name, self.tensors)} Only models of one architecture "
            "can be merged."
        )

    def close(self) -> None:
        for checkpoint in self.opened:
            checkpoint.close()


def open_model(reference: ModelReference, *, allow_pickle: bool = False) -> InputModel:
    """Open a model, from the Hub if it is not a folder; one that is an adapter opens its base model with it.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: Its files contradict each other, or the adapter is of a kind that cannot be merged exactly.
    """
    for path, revision in ((reference.path, reference.revision), (reference.lora, reference.lora_revision)):
        if path is not None and revision is not None and Path(path).is_dir():
            raise ValueError(
                f"{str(reference)!r} names revision {revision!r} of {path!r}, which is a local folder and has no "
                "revisions. Leave the revision out, or give a Hub id."
            )
    folder = local_folder(reference.path, revision=reference.revision, allow_pickle=allow_pickle)
    lora = adapted = None
    if reference.lora is not None:
        lora = local_folder(reference.lora, revision=reference.lora_revision)
        adapted = ModelReference(reference.path, reference.revision)
    elif not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        lora = folder
        adapted = ModelReference(*base_of_adapter(folder / "adapter_config.json"))
        folder = local_folder(adapted.path, revision=adapted.revision, allow_pickle=allow_pickle)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"There is no config.json in {str(folder)!r}; it is not a model folder.")
    config = read_json(folder / "config.json")
    field_of(config, "text_config", dict, where=f"config.json of {str(folder)!r}", default={})
    checkpoint = Checkpoint(folder, allow_pickle=allow_pickle)
    tensors: dict[str, InputTensor] = {
        name: StoredInput(checkpoint, entry) for name, entry in checkpoint.entries.items()
    }
    model = InputModel(reference, folder, config, checkpoint, tensors, [checkpoint], adapted)
    _leave_copies_out(model)
    if lora is not None:
        _adapt(model, read_lora(lora), lora)
    return model


def _leave_copies_out(model: InputModel) -> None:
    """Leave stored copies of tied tensors out, so that head and embeddings stay one tensor.

    A stored head counts as a copy only if it has the same bytes: transformers ties nothing that differs.
    """
    if model.config.get("tie_word_embeddings", model.text_config.get("tie_word_embeddings")) is False:
        return
    names = [name for name in model.tensors if has_token_rows(name)]
    for name in sorted(names, key=lambda one: not one.endswith("lm_head.weight")):
        for other in names:
            if name == other or name in model.copies or other in model.copies:
                continue
            if same_bytes(model.tensors[name], model.tensors[other]) and _takes(model, name, other):
                model.copies[name] = other
    for name in model.copies:
        del model.tensors[name]


def _takes(model: InputModel, copy: str, source: str) -> bool:
    """Whether transformers makes `copy` share the tensor of `source`."""
    if model.is_tied and copy.endswith("lm_head.weight") and source.endswith("embed_tokens.weight"):
        return True
    try:
        target, owner = (model.architecture.parameter_of(one) for one in (copy, source))
        return target is not None and model.architecture.tied.get(target) == owner
    except ValueError:
        return False


def same_bytes(one: InputTensor, other: InputTensor) -> bool:
    """Whether two stored tensors are equal bit by bit; False for tensors that are calculated."""
    if not isinstance(one, StoredInput) or not isinstance(other, StoredInput):
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    step, nbytes = 1 << 12, one.nbytes  # most tensors differ in their first bytes
    start, scratch = 0, Scratch()
    while start < nbytes:
        views = []
        for slot, tensor in enumerate((one, other)):
            views.append(memoryview(scratch.raw(min(step, nbytes - start), slot)))  # type: ignore[arg-type]
            tensor.checkpoint.read_bytes(tensor.entry, start, views[-1])
        if views[0] != views[1]:
            return False
        start, step = start + step, 1 << 22
    return True


def _adapt(model: InputModel, adapter: LoraAdapter, folder: Path) -> None:
    """Put an adapter's changes on a model's tensors, as PEFT does.

    PEFT changes modules by their names. Where the head shares the matrix of the embeddings, a change of one of them
    leaves the other as it was, so that the result is no longer tied.
    """
    model.opened.append(adapter.checkpoint)
    changes: dict[str, str] = {}  # name in the adapter -> tensor of the model
    names = [*adapter.replaced, *(f"{module}.weight" for module in adapter.modules)]
    touched = [name for name in names if has_token_rows(name)]
    groups = _separate(model, touched) if touched else []
    for name in names:
        changes[name] = _tensor_of(model, name, folder)
    # Whole tensors first: PEFT stores the base's embeddings beside the factors that change them.
    for name, entry in adapter.replaced.items():
        _replace(model, changes[name], StoredInput(adapter.checkpoint, entry), folder)
    for module, factors in adapter.modules.items():
        _change(model, changes[f"{module}.weight"], factors, folder)
    for module, stack in adapter.stacks.items():
        _change_experts(model, module, stack, adapter, folder)
    for group in groups:
        _tie_again(model, group)


def _replace(model: InputModel, name: str, tensor: StoredInput, folder: Path) -> None:
    before = model.tensors[name].shape
    if tensor.shape != before and not (has_token_rows(name) and tensor.shape[1:] == before[1:]):
        raise ValueError(
            f"Adapter {str(folder)!r} holds {name!r} with shape {list(tensor.shape)}, but model "
            f"{str(model.reference)!r} has {list(before)} there. It belongs to another model."
        )
    if tensor.shape != before:  # trained after tokens were added
        for part in (model.config, model.text_config):
            if "vocab_size" in part:
                part["vocab_size"] = tensor.shape[0]
    model.tensors[name] = tensor


def _change(model: InputModel, name: str, factors: LoraFactors, folder: Path) -> None:
    before = model.tensors[name]
    if before.shape != factors.shape:
        raise ValueError(
            f"Adapter {str(folder)!r} changes {name!r} with shape {list(factors.shape)}, but model "
            f"{str(model.reference)!r} has {list(before.shape)} there. It belongs to another model."
        )
    _refuse_quantized(model, name, folder)
    model.tensors[name] = AdaptedInput(before, factors)


def _refuse_quantized(model: InputModel, name: str, folder: Path) -> None:
    dtype = model.tensors[name].dtype
    if dtype not in FLOAT_DTYPES or any(name + ending in model.tensors for ending in SCALES):
        raise ValueError(
            f"Adapter {str(folder)!r} changes {name!r}, which model {str(model.reference)!r} stores quantized "
            f"({dtype}, with scales of its own): the change cannot be added to the stored numbers. Use the model with "
            "its weights in bfloat16, float16 or float32."
        )


def _change_experts(
    model: InputModel, module: str, stack: list[tuple[Tensor, Tensor]], adapter: LoraAdapter, folder: Path
) -> None:
    """Put the changes of a module's own parameters (`target_parameters`) on the tensors that they are loaded from."""
    name = model.architecture.parameter_of(module) or module
    part = model.architecture.modules.get(name)
    wanted = adapter.config.get("target_parameters") or []
    leaves = [
        leaf
        for leaf, _ in (part.named_parameters(recurse=False) if part is not None else ())
        if any(f"{name}.{leaf}" == one or f"{name}.{leaf}".endswith(f".{one}") for one in wanted)
    ]
    if len(leaves) != len(stack):
        raise ValueError(
            f"Adapter {str(folder)!r} has {len(stack)} pairs of factors for {module!r}, but model "
            f"{str(model.reference)!r} has the parameters {leaves} there. It belongs to another model."
        )
    for leaf, (down, up) in zip(leaves, stack, strict=True):
        parameter = f"{name}.{leaf}"
        shape = tuple(model.architecture.state[parameter].shape)
        factors = expert_factors(
            parameter, down, up, shape, adapter.config, transposed=bool(getattr(part, "is_transposed", False))
        )
        loading = model.loadings.get(parameter)
        if loading is None:
            raise ValueError(f"Adapter {str(folder)!r} changes {parameter!r}, which {str(model.reference)!r} lacks.")
        for source in loading.sources:
            _refuse_quantized(model, source, folder)
        if loading.converter is None:
            source = loading.sources[0]
            if len(shape) == 2:
                model.tensors[source] = AdaptedInput(model.tensors[source], factors[0])
            else:
                model.tensors[source] = StackedAdaptedInput(model.tensors[source], tuple(factors))
            continue
        for source, expert, rows in _pieces(model, loading, shape, parameter, folder):
            own = LoraFactors(factors[expert].left[rows].contiguous(), factors[expert].right)
            model.tensors[source] = AdaptedInput(model.tensors[source], own)


def _pieces(
    model: InputModel, loading: Loading, shape: tuple[int, ...], parameter: str, folder: Path
) -> Iterable[tuple[str, int, slice]]:
    """Which rows of which expert of a fused parameter each stored matrix is."""
    operations = [type(one).__name__ for one in loading.converter.operations]
    by_pattern: dict[str, list[str]] = {pattern: [] for pattern in loading.converter.source_patterns}
    for source, pattern in zip(loading.sources, loading.patterns, strict=True):
        by_pattern[pattern].append(source)
    places, first = [], 0
    for sources in by_pattern.values():
        rows = model.tensors[sources[0]].shape[0] if sources else 0
        places += [(source, expert, slice(first, first + rows)) for expert, source in enumerate(sources)]
        first += rows
    dims = [getattr(one, "dim", None) for one in loading.converter.operations]
    fits = (operations, dims) in ((["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"], [0, 1]))
    if not fits or first != shape[1] or any(len(sources) != shape[0] for sources in by_pattern.values()):
        raise ValueError(
            f"Adapter {str(folder)!r} changes {parameter!r}, which {str(model.reference)!r} stores in another form "
            f"({', '.join(operations)}). Merge it into its base model with PEFT, and use the result."
        )
    return places


def _separate(model: InputModel, touched: list[str]) -> list[list[str]]:
    """Give every tensor that is tied to one of those touched an entry of its own; return the groups of names."""
    if model.config.get("tie_word_embeddings", model.text_config.get("tie_word_embeddings")) is False:
        return []
    groups: list[list[str]] = []
    for name in touched:
        stored = model.stored_for(name)
        if stored is None or any(stored in group for group in groups):
            continue
        tied = _tied_names(model, name, stored)
        if len(tied) > 1:
            for other in tied:
                model.tensors.setdefault(other, model.tensors[stored])
            groups.append(tied)
    return groups


def _tied_names(model: InputModel, name: str, stored: str) -> list[str]:
    """`stored` and the names of the tensors that share its matrix and are not stored with values of their own."""
    copies = [copy for copy, source in model.copies.items() if source == stored]
    try:
        parameters = model.architecture.ties_of(model.architecture.parameter_of(name) or name)
        own = model.architecture.parameter_of(stored)
    except ValueError:
        parameters, own = {name} if name != stored else set(), stored
    known = {model.architecture.parameter_of(copy) for copy in copies} if copies and len(parameters) > 1 else set()
    others = [one for one in sorted(parameters) if one not in known and one != own and one not in model.loadings]
    return [stored, *copies, *others]


def _tie_again(model: InputModel, group: list[str]) -> None:
    """Make a group one tensor again where all of them are equal, and tell the config where they are not."""
    first, *others = group
    if all(same_bytes(model.tensors[first], model.tensors[other]) for other in others):
        for other in others:
            del model.tensors[other]
        return
    for other in others:
        model.copies.pop(other, None)
    for part in (model.config, model.text_config):
        if part is model.config or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False


def _tensor_of(model: InputModel, name: str, adapter: Path) -> str:
    try:
        stored = model.stored_for(name)
    except ValueError:
        stored = None
    if stored is None:
        raise ValueError(
            f"Adapter {str(adapter)!r} does not fit model {str(model.reference)!r}: "
            f"{unknown_tensor(name, model.tensors)}"
        )
    return stored
