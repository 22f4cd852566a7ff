"""The models that go into a merge, opened: a tensor by its name, a piece of it as float32."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hf_transfer_ext.reading import field_of, read_json
from hf_transfer_ext.weights.checkpoints import FLOAT_DTYPES, Checkpoint, StoredTensor, bytes_of, unknown_tensor
from hf_transfer_ext.weights.devices import on_host
from hf_transfer_ext.weights.lora import LoraFactors, read_lora
from hf_transfer_ext.weights.reference import ModelReference
from hf_transfer_ext.weights.repository import base_of_adapter, local_folder

#: Buffers that old checkpoints store and that every model builds by itself.
REBUILT_BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


#: What follows a weight's name in the name of the scales that it is stored with.
SCALES = ("_scale", "_scale_inv", ".absmax")


class Scratch:
    """Buffers of one thread, made once and used again for every piece.

    Args:
        device: Where the methods calculate. Bytes are read into memory of the host, which is pinned for a GPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self._raw: dict[Hashable, np.ndarray] = {}
        self._floats: dict[int, Tensor] = {}

    def raw(self, nbytes: int, slot: Hashable = 0) -> np.ndarray:
        """The buffer of bytes with the name `slot`."""
        buffer = self._raw.get(slot)
        if buffer is None or len(buffer) < nbytes:
            pinned = self.device.type == "cuda"
            buffer = self._raw[slot] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).numpy()
        return buffer[:nbytes]

    def floats(self, slot: int, count: int) -> Tensor:
        """The float32 buffer number `slot`."""
        buffer = self._floats.get(slot)
        if buffer is None or len(buffer) < count:
            buffer = self._floats[slot] = torch.empty(count, dtype=torch.float32, device=self.device)
        return buffer[:count]


@runtime_checkable
class InputTensor(Protocol):
    """A tensor of one model, whatever it is made from."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """Fill `out` (flat, float32, on any device) with the elements from `start` on."""
        ...


@dataclass(frozen=True)
class StoredInput:
    """A tensor as it lies in a file."""

    checkpoint: Checkpoint
    entry: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def read(self, start: int, out: Tensor, scratch: Scratch) -> None:
        size = self.dtype.itemsize
        if self.dtype == torch.float32 and on_host(out):
            self.checkpoint.read_bytes(self.entry, start * size, bytes_of(out))
            return
        out.copy_(self.stored(start, out.numel(), scratch).to(out.device))  # converted there: fewer bytes travel

    def stored(self, start: int, count: int, scratch: Scratch, slot: Hashable = 0) -> Tensor:
        """Elements as they lie in the file, in the buffer `slot` of the scratch memory."""
        return self.stored_runs([start], count, scratch, slot)

    def stored_runs(self, starts: Sequence[int], count: int, scratch: Scratch, slot: Hashable = 0) -> Tensor:
        """Several runs of elements as they lie in the file, one after the other in the buffer `slot`."""
        size = self.dtype.itemsize
        raw = scratch.raw(len(starts) * count * size, slot)
        view = memoryview(raw)  # type: ignore[arg-type]
        for i, start in enumerate(starts):
            self.checkpoint.read_bytes(self.entry, start * size, view[i * count * size : (i + 1) * count * size])
        return torch.from_numpy(raw).view(self.dtype)


class DerivedInput:
    """What a tensor that is made from another one has of it."""

    inner: InputTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
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


@dataclass
class InputModel:
    """A model of the configuration, opened.

    Args:
        reference: As the configuration names it.
        folder: Where its files are.
        config: Its config.json.
        adapted: The model on which it is an adapter, or None.
    """

    reference: ModelReference
    folder: Path
    config: dict[str, Any]
    checkpoint: Checkpoint
    tensors: dict[str, InputTensor]
    opened: list[Checkpoint] = field(default_factory=list)
    adapted: ModelReference | None = None

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
        """Whether the head shares the matrix of the input embeddings."""
        return bool(self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings", False)))

    def __getitem__(self, name: str) -> InputTensor:
        if name in self.tensors:
            return self.tensors[name]
        if self.is_tied and name.endswith("lm_head.weight"):
            for embedding in self.tensors:
                if embedding.endswith("embed_tokens.weight"):
                    return self.tensors[embedding]
        raise ValueError(
            f"Model {str(self.reference)!r}: {unknown_tensor(name, self.tensors)} Only models of one architecture "
            "can be merged."
        )

    def close(self) -> None:
        for checkpoint in self.opened:
            checkpoint.close()


def open_model(reference: ModelReference, *, allow_pickle: bool = False) -> InputModel:
    """Open a model, from the Hub if it is no folder; one that is an adapter opens its base model with it.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: Its files contradict each other, or the adapter is of a kind that cannot be merged exactly.
    """
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
        raise FileNotFoundError(f"There is no config.json in {str(folder)!r}; it is no model folder.")
    config = read_json(folder / "config.json")
    field_of(config, "text_config", dict, where=f"config.json of {str(folder)!r}", default={})
    checkpoint = Checkpoint(folder, allow_pickle=allow_pickle)
    tensors: dict[str, InputTensor] = {
        name: StoredInput(checkpoint, entry)
        for name, entry in checkpoint.entries.items()
        if not name.endswith(REBUILT_BUFFERS)
    }
    model = InputModel(reference, folder, config, checkpoint, tensors, [checkpoint], adapted)
    if model.is_tied and any(name.endswith("embed_tokens.weight") for name in tensors):
        for name in [name for name in tensors if name.endswith("lm_head.weight")]:
            del tensors[name]  # loading overwrites it with the embeddings, so it must not count here either
    if lora is not None:
        _adapt(model, lora)
    return model


def _adapt(model: InputModel, folder: Path) -> None:
    """Put an adapter's changes on a model's tensors."""
    adapter = read_lora(folder)
    model.opened.append(adapter.checkpoint)
    # Whole tensors first: PEFT stores the base's embeddings beside the factors that change them.
    for key, entry in adapter.replaced.items():
        if key.endswith("lm_head.weight") and model.is_tied:
            embedding = next((other for other in adapter.replaced if other.endswith("embed_tokens.weight")), None)
            same = embedding is not None and torch.equal(
                adapter.checkpoint.read(entry.name), adapter.checkpoint.read(adapter.replaced[embedding].name)
            )
            if not same:
                raise ValueError(
                    f"Adapter {str(folder)!r} gives the head of {str(model.reference)!r} a matrix of its own, but the "
                    "model ties it to the input embeddings. Merge the adapter into an untied copy first."
                )
            continue
        model.tensors[_tensor_of(model, key, folder)] = StoredInput(adapter.checkpoint, entry)
    for module, factors in adapter.modules.items():
        name = _tensor_of(model, f"{module}.weight", folder)
        if model.tensors[name].shape != factors.shape:
            raise ValueError(
                f"Adapter {str(folder)!r} changes {name!r} with shape {list(factors.shape)}, but model "
                f"{str(model.reference)!r} has {list(model.tensors[name].shape)} there. It belongs to another model."
            )
        if model.tensors[name].dtype not in FLOAT_DTYPES or any(name + ending in model.tensors for ending in SCALES):
            raise ValueError(
                f"Adapter {str(folder)!r} changes {name!r}, which model {str(model.reference)!r} stores quantized "
                f"({model.tensors[name].dtype}, with scales of its own): the change cannot be added to the stored "
                "numbers. Use the model with its weights in bfloat16, float16 or float32."
            )
        model.tensors[name] = AdaptedInput(model.tensors[name], factors)


def _tensor_of(model: InputModel, name: str, adapter: Path) -> str:
    if name not in model.tensors:
        raise ValueError(
            f"Adapter {str(adapter)!r} does not fit model {str(model.reference)!r}: "
            f"{unknown_tensor(name, model.tensors)}"
        )
    return name
