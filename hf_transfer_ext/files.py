"""Files that are either whole or absent: written aside and renamed, inside their folder, with room on the disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: A folder that holds one of these holds a result that somebody may want to keep.
RESULT_FILES = ("config.json", "adapter_config.json", "model.safetensors.index.json", "hf_transfer_ext.json")


def refuse_existing_output(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Return `folder` as a path, or raise `FileExistsError` where it already holds a model and may not be replaced."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output has to be a folder, but {str(path)!r} is a file. Name another one.")
    if not overwrite:
        found = [name for name in RESULT_FILES if (path / name).exists()]
        if found:
            raise FileExistsError(
                f"The output folder {str(path)!r} already holds a result ({found[0]}). "
                "Name another folder, or pass --overwrite to replace it."
            )
    return path


@contextmanager
def written_aside(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; rename it to `folder` when the block ends without an error.

    Readers see the old folder or the new one, never a half-written one. Where the block raises, nothing is left.
    A folder that is there already is replaced as a whole, and only with `overwrite` if it holds a result.
    """
    target = refuse_existing_output(folder, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        os.chmod(aside, 0o777 & ~_umask())
        yield aside
        replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of `target`; an old `target` is removed only after the new one stands."""
    if not target.exists():
        os.rename(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    os.rename(target, old / "was")
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def path_inside(root: str | Path, relative: str) -> Path:
    """Join a path that came from a file or a repository, and refuse one that leads out of `root` (links included)."""
    base = Path(root).resolve()
    path = (base / relative).resolve()
    if Path(relative).is_absolute() or not path.is_relative_to(base):
        raise ValueError(f"{relative!r} leads out of its folder {str(root)!r}; refused. Mend the file that names it.")
    return base / relative


def require_free_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise `OSError` before any work if the disk under `folder` has less than `needed_bytes` free."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise OSError(
            f"Writing to {str(folder)!r} needs {needed_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free. "
            "Free some space or name a folder on another disk."
        )


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
