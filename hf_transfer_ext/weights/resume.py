"""Work that resumes where a kill ended it: in a hidden folder beside the result, named by what the bytes depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_transfer_ext
from hf_transfer_ext.files import Stamp, clean_up, only_writer, publish, refuse_existing_output, stamp_of
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.ranks import Ranks

#: Stands in the hidden folder while it may be resumed, and is removed before the folder is published. Without it the
#: folder holds an earlier result that was exchanged for the new one.
_RESUMABLE = ".resumable"


@dataclass(frozen=True)
class Work:
    """What a result depends on.

    Args:
        key: A hash of all of it: the settings, the input files, the code and the libraries, and the boot. What a
            killed process wrote is safe with the system; what was written before the machine went down may not be.
        inputs: The input files as they were when they were opened.
    """

    key: str
    inputs: Mapping[Path, Stamp]

    def refuse_changed_inputs(self) -> None:
        """Raise `OSError` if an input file was changed or deleted since it was opened."""
        for file, stamp in self.inputs.items():
            try:
                changed = "was changed" if stamp_of(file) != stamp else ""
            except FileNotFoundError:
                changed = "was deleted"
            if changed:
                raise OSError(
                    f"The input {str(file)!r} {changed} while it was read, so the result would mix two models. "
                    "Nothing was published. Start again when the inputs stay as they are."
                )


def work_of(content: Mapping[str, Any], checkpoints: Iterable[Checkpoint]) -> Work:
    """Name a piece of work by its settings and its input folders.

    Args:
        content: Everything else that the bytes depend on: configuration, layout, options.
        checkpoints: All that are read, adapters included.
    """
    inputs = {file: stamp for checkpoint in checkpoints for file, stamp in checkpoint.stamps.items()}
    boot = Path("/proc/sys/kernel/random/boot_id")
    whole = {
        "code": _code_version(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        **content,
        "files": sorted((str(file.resolve()), *stamp) for file, stamp in inputs.items()),
    }
    return Work(hashlib.sha256(json.dumps(whole, default=list).encode()).hexdigest()[:16], inputs)


@lru_cache(maxsize=1)
def _code_version() -> str:
    """A hash of what calculates: torch, numpy, and the sources and kernels of this package."""
    digest = hashlib.sha256(f"{torch.__version__} {np.__version__}".encode())
    root = Path(hf_transfer_ext.__file__).parent
    for room in ("adapters", "merging", "weights"):
        for file in sorted(file for file in (root / room).rglob("*") if file.suffix in (".py", ".c", ".so", ".pyd")):
            digest.update(f"{file.relative_to(root)} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def resumable_folder(
    target: Path,
    work: Work,
    ranks: Ranks = Ranks(),  # noqa: B008
    *,
    overwrite: bool,
) -> Iterator[Path]:
    """Yield the hidden folder of the work, which becomes `target` when the block ends without an error.

    It outlives a kill and Ctrl-C, for the next run of the same work; after any other error nothing is left. Partial
    folders of other work on `target` are removed. What begins with a dot is bookkeeping for the next run, and is not
    published. The first rank creates, publishes and removes; the others wait.

    Raises:
        FileExistsError: Another run writes `target`, or `target` may not be replaced (`refuse_existing_output`).
        OSError: At the end: an input changed in the meantime, or a written file cannot be opened.
    """
    partial = target.with_name(f".{target.name}.partial-merge-{ranks.gather(work.key)[0]}")
    with ExitStack() as lock:
        with ranks.together():
            if ranks.is_first:
                target.parent.mkdir(parents=True, exist_ok=True)
                lock.enter_context(only_writer(target))
                clean_up(target, keep=partial)
                refuse_existing_output(target, overwrite=overwrite, inputs=work.inputs)
                if not (partial / _RESUMABLE).exists():
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    (partial / _RESUMABLE).touch()
        try:
            yield partial
            with ranks.together():
                work.refuse_changed_inputs()
            with ranks.together():
                if ranks.is_first:
                    _refuse_broken_files(partial)
                    _remove_bookkeeping(partial)
                    publish(partial, target, overwrite=overwrite, inputs=work.inputs)
        except KeyboardInterrupt:
            raise
        except BaseException:
            if ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _refuse_broken_files(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise OSError(f"{file.name!r} was not written correctly ({error}); nothing was published.") from error


def _remove_bookkeeping(folder: Path) -> None:
    (folder / _RESUMABLE).unlink()  # first: what is left after a kill is not resumed
    for bookkeeping in folder.glob(".*"):
        if bookkeeping.is_dir():
            shutil.rmtree(bookkeeping)
        else:
            bookkeeping.unlink()


class Parts:
    """Results of single tensors in a folder, for the next run if this one is killed; each is written atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def get(self, name: str) -> dict[str, Tensor] | None:
        file = self._file(name)
        return load_file(file) if file.exists() else None

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        file = self._file(name)
        aside = file.with_suffix(".partial")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside)
        os.replace(aside, file)

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
