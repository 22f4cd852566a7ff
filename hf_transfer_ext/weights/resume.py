"""Work that goes on where a kill ended it: in a hidden folder beside the result, named by what the bytes depend on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_transfer_ext import __version__
from hf_transfer_ext.files import refuse_existing_output, replace_folder
from hf_transfer_ext.weights.ranks import Ranks


def key_of(content: Mapping[str, Any], files: Iterable[Path]) -> str:
    """A hash of what the work depends on, of the sizes and times of its input files, and of the boot.

    What a killed process wrote is safe with the system; what was written before the machine went down may not be, so
    after a new start of the machine nothing is taken over.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    whole = {
        "version": __version__,
        "boot": boot.read_text().strip() if boot.exists() else "",
        **content,
        "files": [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    }
    return hashlib.sha256(json.dumps(whole, default=list).encode()).hexdigest()[:16]


@contextmanager
def resumable_folder(
    target: Path,
    key: str,
    ranks: Ranks = Ranks(),  # noqa: B008
    *,
    overwrite: bool,
) -> Iterator[Path]:
    """Yield the hidden folder of the work `key`, which becomes `target` when the block ends without an error.

    It outlives a kill and Ctrl-C, for the next run of the same work; after any other error nothing is left. Partial
    folders of other work on `target` are removed. What begins with a dot is bookkeeping for the next run, and is not
    published. The first rank makes, publishes and removes; the others wait.
    """
    prefix = f".{target.name}.partial-merge-"
    partial = target.parent / f"{prefix}{key}"
    with ExitStack() as lock:
        with ranks.together():
            if ranks.is_first:
                target.parent.mkdir(parents=True, exist_ok=True)
                lock.enter_context(_only_one(target.parent / f".{target.name}.merge-lock", target))
                for other in target.parent.glob(f"{prefix}*"):
                    if other != partial:
                        shutil.rmtree(other, ignore_errors=True)
                partial.mkdir(exist_ok=True)
        try:
            yield partial
            with ranks.together():
                if ranks.is_first:
                    refuse_existing_output(target, overwrite=overwrite)
                    for bookkeeping in partial.glob(".*"):
                        shutil.rmtree(bookkeeping) if bookkeeping.is_dir() else bookkeeping.unlink()
                    replace_folder(partial, target)
        except KeyboardInterrupt:
            raise
        except BaseException:
            if ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _only_one(lock: Path, target: Path) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however it ends."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(
                f"Another run that writes {str(target)!r} is going on. Wait for it, or name another folder."
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


class Parts:
    """Results of single tensors in a folder, for the next run where this one is killed; read and written whole."""

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
