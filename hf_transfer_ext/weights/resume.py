"""Resume work after a kill: in a hidden folder next to the result, named by a hash of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

import hf_transfer_ext
from hf_transfer_ext.files import Stamp, clean_up, only_writer, publish, refuse_existing_output, stamp_of
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

#: Marks the hidden folder as resumable, and is removed before the folder is published. Without this file, the folder
#: contains an earlier result that was exchanged for the new one.
_RESUMABLE = ".resumable"


@dataclass(frozen=True)
class Work:
    """Everything that a result depends on.

    Args:
        key: A hash of the settings, the input files, the code, the libraries, and the boot id. What a killed process
            wrote is still in the system's cache; what was written before the machine went down may be lost.
        inputs: The state of each input file when it was opened.
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
                    "Nothing was published. Start again when the inputs no longer change."
                )


def work_of(content: Mapping[str, Any], checkpoints: Iterable[Checkpoint]) -> Work:
    """Identify a piece of work by its settings and its input folders.

    Args:
        content: Everything else that the output depends on: configuration, layout, options.
        checkpoints: All checkpoints that are read, including adapters.
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
    """A hash of the code: versions of torch and numpy, and the sources and kernels of this package."""
    digest = hashlib.sha256(f"{version('torch')} {version('numpy')}".encode())
    root = Path(hf_transfer_ext.__file__).parent
    for room in ("adapters", "edits", "merging", "weights"):
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

    After a kill or Ctrl-C it is kept for the next run of the same work; after any other error it is removed. Partial
    folders of other work on `target` are removed. Entries that begin with a dot are bookkeeping for the next run and
    are not published. The first rank creates, publishes and removes the folder; the others wait.

    Raises:
        FileExistsError: Another run writes `target`, or `target` may not be replaced (`refuse_existing_output`).
        OSError: At the end, if an input has changed in the meantime or a written file cannot be opened.
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
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise OSError(f"{file.name!r} was not written correctly ({error}); nothing was published.") from error


def _remove_bookkeeping(folder: Path) -> None:
    (folder / _RESUMABLE).unlink()  # first, so that the rest is not resumed after a kill
    for bookkeeping in folder.glob(".*"):
        if bookkeeping.is_dir():
            shutil.rmtree(bookkeeping)
        else:
            bookkeeping.unlink()


class Parts:
    """Per-tensor results in a folder, for the next run if this one is killed; each file is written atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def get(self, name: str) -> dict[str, Tensor] | None:
        from safetensors.torch import load_file

        file = self._file(name)
        return load_file(file) if file.exists() else None

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        file = self._file(name)
        aside = file.with_suffix(".partial")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside)
        os.replace(aside, file)

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
