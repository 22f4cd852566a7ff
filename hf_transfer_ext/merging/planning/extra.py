"""Extra tensors of the models, such as Fisher diagonals or Gram matrices: files that a source names under `tensors`.

    models:
      - model: org/name
        tensors: {fisher: path/to/folder-or-file.safetensors}

A file holds tensors under the names that the weights have in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_transfer_ext.merging.method import Extra, MergeMethod
from hf_transfer_ext.merging.planning.config import MergeConfig, Source
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.dtypes import FLOAT_DTYPES
from hf_transfer_ext.weights.opened import InputTensor, StoredInput


@dataclass(frozen=True)
class ExtraFiles:
    """The opened files of extra tensors, by the path that the configuration names."""

    checkpoints: Mapping[str, Checkpoint]

    def of(
        self, method: MergeMethod, sources: Sequence[tuple[Source, str]], shape: tuple[int, ...]
    ) -> dict[str, tuple[InputTensor, ...]]:
        """The extra tensors of one weight: name -> one for each source; empty where no source has an optional one.

        Args:
            sources: Each with the weight's name in its model.
            shape: Of the weight.

        Raises:
            ValueError: A tensor is missing, or has another shape than its declaration says.
        """
        found: dict[str, tuple[InputTensor, ...]] = {}
        for key, declared in method.extra.items():
            there = [name in self._file_of(source, key) for source, name in sources]
            if not declared.required and not any(there):
                found[key] = ()
                continue
            for (source, name), is_there in zip(sources, there, strict=True):
                if not is_there:
                    raise ValueError(
                        f"Model {str(source.model)!r} has no {key!r} tensor for {name!r} in {source.tensors[key]!r}. "
                        "Compute it, or leave the model out."
                    )
            found[key] = tuple(self._open(source, key, name, declared, shape) for source, name in sources)
        return found

    def _open(self, source: Source, key: str, name: str, declared: Extra, shape: tuple[int, ...]) -> InputTensor:
        checkpoint = self._file_of(source, key)
        entry = checkpoint[name]
        wanted = shape if declared.shape == "weight" else (shape[-1:] * 2 if shape else ())
        if entry.shape != wanted or entry.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"The {key!r} tensor of model {str(source.model)!r} for {name!r} needs shape {list(wanted)} and a "
                f"floating dtype, got {list(entry.shape)} and {entry.dtype}."
            )
        return StoredInput(checkpoint, entry)

    def _file_of(self, source: Source, key: str) -> Checkpoint:
        return self.checkpoints[source.tensors[key]]


@contextmanager
def open_extra(config: MergeConfig) -> Iterator[ExtraFiles]:
    """Open the files that the sources of a configuration name under `tensors`, until the block ends.

    Raises:
        ValueError: The vocabulary of the result is rearranged, which extra tensors are not.
        FileNotFoundError: There is no such file or folder.
    """
    sources = [source for module in config.modules for part in module.slices for source in part.sources]
    paths = dict.fromkeys(path for source in sources for path in source.tensors.values())
    if paths and config.tokenizer is not None:
        raise ValueError(
            "`tensors` belong to the rows of the models' own vocabularies, and `tokenizer` rearranges these. Give the "
            "models one vocabulary first, or leave `tokenizer` out."
        )
    checkpoints: dict[str, Checkpoint] = {}
    try:
        for path in paths:
            checkpoints[path] = _open_path(Path(path))
        yield ExtraFiles(checkpoints)
    finally:
        for checkpoint in checkpoints.values():
            checkpoint.close()


def _open_path(path: Path) -> Checkpoint:
    """A folder with safetensors files, or one such file."""
    if path.is_dir():
        return Checkpoint(path)
    if path.is_file() and path.suffix == ".safetensors":
        return Checkpoint(path.parent, stem=path.stem)
    raise FileNotFoundError(f"`tensors` needs a folder or a .safetensors file; there is none at {str(path)!r}.")
