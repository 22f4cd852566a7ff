"""Checkpoints in the safetensors format, read in pieces and written to files whose size is known in advance.

A file is `8 bytes of header length | JSON header | data`; the header gives each tensor's dtype, shape and offsets. A
piece of a tensor is one read, so a checkpoint of any size can be processed with a few megabytes of memory. Nothing is
memory-mapped: mapped pages count as resident memory, and a truncated file would cause a bus error instead of an
exception.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_transfer_ext.files import Stamp, require_free_space, stamp_of, write_text
from hf_transfer_ext.reading import field_of, one_line, read_json, shown
from hf_transfer_ext.registry import unknown_name
from hf_transfer_ext.weights.dtypes import DTYPES, Dtype, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor

#: Longest header that is accepted; the limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000

#: Shards of a written checkpoint hold at most this many bytes, unless one tensor alone is larger.
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a file: its bytes are `file[offset : offset + nbytes]`. A tensor from a pickle is in `loaded`."""

    file: Path
    offset: int
    loaded: Tensor | None = None


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Parse the header of a safetensors file and validate it as the safetensors library does.

    The tensors fill the file from the header to its end, without gaps or overlaps.

    Raises:
        ValueError: The file is not a safetensors file, is truncated, or its header contradicts itself.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise ValueError(
                f"{str(file)!r} is not a complete safetensors file: its header does not fit in its {size} bytes. "
                "Download it again; if it is a Git LFS pointer, pull it first."
            )
        text = stream.read(length)
    try:
        header = _parsed(text)
        _check_metadata(header.pop("__metadata__", None))
        entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    except (KeyError, TypeError, AttributeError, _HeaderError) as error:
        raise ValueError(f"The header of {str(file)!r} cannot be read ({error}). Download the file again.") from error
    _check_places(file, entries, 8 + length, size)
    return entries


class _HeaderError(ValueError):
    """A header that the format does not allow."""


def _parsed(text: bytes) -> Any:
    if not text.startswith(b"{"):
        raise _HeaderError("it does not begin with '{'")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _HeaderError(str(error)) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise _HeaderError(f"duplicate name {next(name for name in names if names.count(name) > 1)!r}")
    return content


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _HeaderError("__metadata__ must map names to strings")


def _entry(file: Path, name: str, value: Any, data_start: int) -> StoredTensor:
    if not isinstance(value, dict):
        raise _HeaderError(f"the entry of {name!r:.200} must be a mapping")
    if value["dtype"] not in DTYPES:
        raise ValueError(f"Tensor {name!r} in {str(file)!r}: {unknown_name('dtype', value['dtype'], DTYPES)}")
    places, shape = value["data_offsets"], value["shape"]
    if not all(isinstance(one, list) and all(type(number) is int for number in one) for one in (places, shape)):
        raise _HeaderError(f"offsets and shape of {name!r} must be lists of integers")
    if len(places) != 2:
        raise _HeaderError(f"{name!r} needs two offsets, got {places}")
    begin, end = places
    entry = StoredTensor(name, DTYPES[value["dtype"]], tuple(shape), file, data_start + begin)
    if begin < 0 or any(extent < 0 for extent in entry.shape) or entry.nbytes != end - begin:
        raise ValueError(
            f"The header of {str(file)!r} contradicts itself: tensor {name!r} of shape {list(entry.shape)} and dtype "
            f"{value['dtype']} needs {entry.nbytes} bytes, but its offsets are {begin}..{end}. Download it again."
        )
    return entry


def _check_places(file: Path, entries: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    end, before = data_start, "the header"
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            fault = "overlaps with" if entry.offset < end else "leaves a gap after"
            raise ValueError(
                f"The header of {str(file)!r} contradicts itself: tensor {entry.name!r} {fault} {before}, at byte "
                f"{entry.offset} instead of {end}. Download the file again."
            )
        end, before = entry.offset + entry.nbytes, repr(entry.name)
    if size < end:
        raise ValueError(
            f"{str(file)!r} is truncated: tensor {before} ends at byte {end}, the file at {size}. Download it again."
        )
    if size > end:
        raise ValueError(
            f"{str(file)!r} has {size - end} bytes after its last tensor, which is not allowed. Download it again."
        )


#: Extensions of the files in a model folder that weights, configs and tokenizers are read from.
_READ = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")

#: Windows converts line endings in files that are not opened with this flag.
_BINARY: int = getattr(os, "O_BINARY", 0)

#: Held while seeking and then reading or writing, on systems that cannot do both in one call.
_SEEKING = threading.Lock()


def _read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Read into the beginning of `view`, starting at `offset`; returns the number of bytes read."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    if hasattr(os, "pread"):
        read = os.pread(descriptor, len(view), offset)
    else:
        with _SEEKING:
            os.lseek(descriptor, offset, os.SEEK_SET)
            read = os.read(descriptor, len(view))
    view[: len(read)] = read
    return len(read)


def _write_at(descriptor: int, view: memoryview | bytes, offset: int) -> None:
    """Write all of `view`, starting at `offset`."""
    rest, done = memoryview(view), 0
    while done < len(rest):
        if hasattr(os, "pwrite"):
            done += os.pwrite(descriptor, rest[done:], offset + done)
        else:
            with _SEEKING:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                done += os.write(descriptor, rest[done:])


class Checkpoint:
    """The tensors of a model folder, readable in pieces from several threads at once.

    Args:
        folder: Holds `<stem>.safetensors`, or shards and their `<stem>.safetensors.index.json`.
        stem: "model" for models, "adapter_model" for PEFT adapters.
        allow_pickle: Also accept `pytorch_model.bin`, loaded into memory with `weights_only=True`.
    """

    def __init__(self, folder: str | Path, *, stem: str = "model", allow_pickle: bool = False) -> None:
        self.folder = Path(folder)
        #: State of the files that a job may read, recorded before the first read (`resume.Work`).
        self.stamps: dict[Path, Stamp] = {
            file: stamp_of(file) for file in sorted(self.folder.glob("*")) if file.suffix in _READ and file.is_file()
        }
        self.entries = _find_entries(self.folder, stem, allow_pickle)
        self._descriptors: dict[Path, int] = {
            file: os.open(file, os.O_RDONLY | _BINARY)
            for file in sorted({entry.file for entry in self.entries.values() if entry.loaded is None})
        }

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self.entries:
            raise ValueError(f"Model {str(self.folder)!r}: {unknown_tensor(name, self.entries)}")
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def read_bytes(self, entry: StoredTensor, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of `entry`, starting at byte `start`."""
        if entry.loaded is not None:
            view[:] = bytes_of(entry.loaded.contiguous())[start : start + len(view)]
            return
        descriptor, done = self._descriptors[entry.file], 0
        while done < len(view):
            count = _read_at(descriptor, view[done:], entry.offset + start + done)
            if count == 0:
                raise OSError(
                    f"{str(entry.file)!r} ended in the middle of tensor {entry.name!r}. It was truncated while it was "
                    "read; do not change the inputs of a running job."
                )
            done += count

    def read(self, name: str) -> Tensor:
        """One complete tensor, in its stored dtype and shape."""
        import torch

        entry = self[name]
        flat = torch.empty(entry.numel, dtype=entry.dtype.torch)
        self.read_bytes(entry, 0, bytes_of(flat))
        return flat.reshape(entry.shape)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def unknown_tensor(name: str, known: Iterable[str]) -> str:
    """Error message for an unknown tensor, with only the closest name, since models have thousands of them."""
    names = list(known)
    message = unknown_name("tensor", name, names)
    return message.split(" Available:")[0] + f" There are {len(names)} tensors."


def _find_entries(folder: Path, stem: str, allow_pickle: bool) -> dict[str, StoredTensor]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        return _indexed_entries(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    named = folder / f"{stem}.safetensors"
    if named.exists() or len(files) == 1:
        return read_header(named if named.exists() else files[0])
    if files:
        raise ValueError(
            f"{str(folder)!r} contains {len(files)} safetensors files but no {index.name} that lists those of the "
            "model. Download the index too."
        )
    pickles = sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("adapter_model.bin"))
    if pickles and allow_pickle:
        return _pickled_entries(pickles)
    if pickles:
        raise ValueError(
            f"{str(folder)!r} contains only pickled weights ({pickles[0].name}), which can run code when loaded. "
            "Convert them to safetensors, or pass --allow-pickle to load them with weights_only=True."
        )
    raise FileNotFoundError(f"There are no weights in {str(folder)!r}: it needs {stem}.safetensors or shards of it.")


def _indexed_entries(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = field_of(read_json(index), "weight_map", dict, where="the index")
        shards = sorted({field_of(weight_map, name, str, where="`weight_map`") for name in weight_map})
    except ValueError as error:
        raise ValueError(f"The index {str(index)!r} cannot be read: {error} Download it again.") from error
    headers = {}
    for shard in shards:
        # Compare names, not resolved paths: files in the Hub cache are links that lead out of their folder.
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(f"The index {str(index)!r} points outside its folder, to {shard!r}; refused.")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"Shard {shard!r}, listed in {str(index)!r}, is missing. Download it too.")
        headers[shard] = read_header(folder / shard)
    missing = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if missing:
        raise ValueError(
            f"Tensor {missing[0]!r} is not in shard {weight_map[missing[0]]!r}, though {str(index)!r} says so "
            f"({len(missing)} such tensors). Index and shards belong to different versions; download both again."
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _pickled_entries(files: list[Path]) -> dict[str, StoredTensor]:
    import torch

    entries = {}
    for file in files:
        try:
            # Files in the old format, which is not a zip archive, cannot be memory-mapped.
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # unpickling untrusted bytes can raise anything
            raise ValueError(
                f"{str(file)!r} cannot be loaded with weights_only=True: {one_line(error)} It is damaged or "
                "contains more than tensors; convert it to safetensors where it was created."
            ) from error
        if not isinstance(stored, dict):
            raise ValueError(f"{str(file)!r} must hold a mapping from names to tensors, got {shown(stored)}.")
        for name, tensor in stored.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{str(file)!r} must hold tensors by name, but {shown(name)} is {shown(tensor)}.")
            entries[name] = StoredTensor(name, stored_dtype(tensor.dtype), tuple(tensor.shape), file, 0, tensor)
    return entries


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[TensorSpec]]:
    """Split tensors into shards, in order; a new shard begins before one would exceed the limit."""
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be at least 1, got {max_shard_bytes}.")
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file whose layout is known before its data.

    Args:
        header: The first bytes of the file: header length and header.
        places: The tensors, each with the byte offset at which it begins.
    """

    name: str
    header: bytes
    size: int
    places: list[tuple[TensorSpec, int]]

    def is_begun(self, folder: Path) -> bool:
        """Whether the file exists with its header and full length, so that some of its tensors may be complete."""
        file = folder / self.name
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        with open(file, "rb") as stream:
            return stream.read(len(self.header)) == self.header


def plan_files(
    specs: Iterable[TensorSpec], *, stem: str = "model", max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[PlannedFile]:
    """The files of a checkpoint. Tensors of a file are ordered by dtype size, so each is aligned to its dtype."""
    shards = plan_shards(specs, max_shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    return [_plan_file(name, shard) for name, shard in zip(names, shards, strict=True)]


def _plan_file(name: str, shard: list[TensorSpec]) -> PlannedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(shard, key=lambda spec: -spec.dtype.itemsize)
    ends = np.cumsum([spec.nbytes for spec in ordered], dtype=np.int64).tolist()
    for spec, end in zip(ordered, ends, strict=True):
        header[spec.name] = {
            "dtype": spec.dtype.code,
            "shape": list(spec.shape),
            "data_offsets": [end - spec.nbytes, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = [(spec, start + end - spec.nbytes) for spec, end in zip(ordered, ends, strict=True)]
    return PlannedFile(name, struct.pack("<Q", len(text)) + text, start + (ends[-1] if ends else 0), places)


class CheckpointWriter:
    """Safetensors files with a known layout, filled in any order and from several threads at once.

    The headers and the full length of all files are written first, so a full disk is detected before any work.

    Args:
        folder: Existing temporary folder, provided by the caller (`files.written_aside`).
        specs: The tensors that will be written. The shards follow this order.
        stem: Name of the files without extension.
        resume: Keep the contents of the files if all of them were begun (`PlannedFile.is_begun`).
    """

    def __init__(
        self,
        folder: Path,
        specs: Iterable[TensorSpec],
        *,
        stem: str = "model",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        resume: bool = False,
    ) -> None:
        planned = plan_files(specs, stem=stem, max_shard_bytes=max_shard_bytes)
        self.nbytes = sum(spec.nbytes for file in planned for spec, _ in file.places)
        self._places: dict[str, tuple[int, int, TensorSpec]] = {}
        self._descriptors: list[int] = []
        keep = resume and all(file.is_begun(folder) for file in planned)
        if not keep:
            require_free_space(folder, self.nbytes)
        try:
            for file in planned:
                self._open(folder, file, keep)
        except BaseException:
            self.close()
            raise
        if len(planned) > 1:
            weight_map = {spec.name: file.name for file in planned for spec, _ in file.places}
            content = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(folder / f"{stem}.safetensors.index.json", json.dumps(content, indent=2) + "\n")

    def _open(self, folder: Path, file: PlannedFile, keep: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | _BINARY | (0 if keep else os.O_TRUNC)
        descriptor = os.open(folder / file.name, flags, 0o666)
        self._descriptors.append(descriptor)
        if not keep:
            _write_at(descriptor, file.header, 0)  # before the full length, which marks the file as begun
            _allocate(descriptor, file.size)
        for spec, place in file.places:
            self._places[spec.name] = (descriptor, place, spec)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write `values` (contiguous, in the dtype of the spec) as elements `start`, `start + 1`, ... of a tensor."""
        spec = self._places[name][2]
        if stored_dtype(values.dtype) != spec.dtype or start + values.numel() > spec.numel:
            raise ValueError(
                f"Tensor {name!r} was announced as {spec.dtype} with {spec.numel} elements, got {values.dtype} for "
                f"elements {start}..{start + values.numel()}."
            )
        self.write_bytes(name, start * spec.dtype.itemsize, bytes_of(values))

    def write_bytes(self, name: str, start: int, view: memoryview) -> None:
        """Write raw bytes, starting at byte `start` of a tensor."""
        descriptor, offset, _ = self._places[name]
        _write_at(descriptor, view, offset + start)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _allocate(descriptor: int, size: int) -> None:
    """Allocate the whole file at once; where the system cannot, create a sparse file of that length."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # no such call on this system
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, size)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], *, stem: str = "model", max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors that are already in memory."""
    specs = [TensorSpec(name, stored_dtype(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    with CheckpointWriter(folder, specs, stem=stem, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor.detach().cpu().contiguous())
