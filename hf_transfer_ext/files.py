"""Output folders that are written atomically: checked first, written to a temporary folder, renamed into place.

An output folder is new, empty, or holds an earlier result that the user asked to replace. While a result is
written, these hidden entries exist next to it. A run that is killed may leave them for the next run into the same
folder, which resumes, restores or removes them:

    .NAME.partial-*     the unfinished result
    .NAME.old-*         the earlier result, on systems that cannot exchange two folders in one step
    .NAME.output-lock   the lock that keeps a second run out
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

#: The files that a result consists of. `--overwrite` replaces these and nothing else.
RESULT_FILES = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "adapter_model-*-of-*.safetensors", "adapter_model.safetensors.index.json",
    "config.json", "adapter_config.json", "generation_config.json", "training_args.bin",
    "configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py", "*_processing_*.py",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tekken.json",
    "*.spm", "vocab.bpe", "normalizer.json", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "feature_extractor_config.json", "image_processor_config.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "README.md", "hf_transfer_ext.json", ".eval_results/*.yaml", "comparison.png", "vocabulary_map.json",
    "residuals.json", "transfer.json", "transfer_seeds.json", "discriminator/adapter_*", "discriminator/README.md",
    "mergekit_config.yml", "mergekit_moe_config.yml",
    ".*.partial-*",  # left by a kill in `write_text`
)  # fmt: skip


def refuse_existing_output(
    folder: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | Path | None] = (),
    also: Iterable[str] = (),
) -> Path:
    """Return `folder` as a path if a result may be written there; call it before any work.

    Args:
        overwrite: Accept a folder with files of an earlier result (`RESULT_FILES`). Other files are always refused.
        inputs: Files and folders that the run reads. Hub ids and None are ignored.
        also: Patterns of other files that this kind of result consists of, relative to the folder.

    Raises:
        FileExistsError: The folder holds a result and `overwrite` is False, or it holds other files.
        ValueError: The folder is or contains the working directory, or it contains one of the inputs.
        OSError: The folder is a file, a link or a mount point, or it cannot be created.
    """
    path = Path(folder)
    if path.name in ("", ".."):
        path = path.resolve()
    _refuse_place(path)
    refuse_inputs_inside(path, inputs)
    found = sorted(_files_in(path)) if path.exists() else []
    known = (*RESULT_FILES, *also)
    recorded = _recorded_files(path)
    foreign = [name for name in found if not _is_of_a_result(name, known) and name not in recorded]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise FileExistsError(
            f"The output folder {str(path)!r} holds files that are not part of a result: {', '.join(foreign[:3])}"
            f"{more}. Not even --overwrite replaces those. Name a new folder, or move them away."
        )
    if found and not overwrite:
        raise FileExistsError(
            f"The output folder {str(path)!r} already holds a result ({found[0]}). "
            "Name another folder, or pass --overwrite to replace it."
        )
    return path


def _recorded_files(folder: Path) -> set[str]:
    """The files that the record of an earlier result lists as its own; none where there is no readable record."""
    path = folder / "hf_transfer_ext.json"
    try:
        if path.is_symlink() or path.stat().st_size > 20_000_000:
            return set()
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    listed = content.get("result") if isinstance(content, dict) else None
    return set(listed) if isinstance(listed, dict) else set()


def refuse_inputs_inside(folder: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise `ValueError` if an existing input is `folder` itself or is inside it."""
    own = Path(folder).resolve()
    for one in inputs:
        if one is None or not os.path.lexists(one):
            continue
        for place in (Path(one).parent.resolve() / Path(one).name, Path(one).resolve()):
            if own == place or own in place.parents:
                raise ValueError(
                    f"The output folder {str(folder)!r} holds the input {str(one)!r}, which would be replaced. Name "
                    "another folder."
                )


def refuse_shared_outputs(*folders: str | Path | None) -> None:
    """Raise `ValueError` if two output folders of one run are the same, or one is inside the other."""
    places = [Path(folder).resolve() for folder in folders if folder is not None]
    for i, one in enumerate(places):
        for other in places[i + 1 :]:
            if one == other or one in other.parents or other in one.parents:
                raise ValueError(
                    f"The output folders {str(one)!r} and {str(other)!r} contain each other. Name separate folders."
                )


def _refuse_place(path: Path) -> None:
    name = repr(str(path))
    if path.is_symlink():
        raise FileExistsError(f"The output folder {name} is a link. Name the folder that it points to.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output must be a folder, but {name} is a file. Choose another path.")
    own, here = path.resolve(), Path.cwd()
    if own == here or own in here.parents:
        raise ValueError(
            f"The output folder {name} is the working directory or holds it, so it cannot be replaced as a whole. "
            "Name a folder in it."
        )
    if path.exists() and _is_mount(path):
        raise OSError(
            f"The output folder {name} is a mount point, so nothing can be renamed to it. Name a folder in it."
        )
    if len(os.fsencode(path.name)) > 200:
        raise OSError(f"The name of the output folder {name} is longer than 200 bytes. Choose a shorter one.")
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"The output folder {name} would be in {str(parent)!r}, which is not a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"The output folder {name} cannot be created: {str(parent)!r} is read-only. Name another folder."
        )


def _is_mount(path: Path) -> bool:
    """Whether a path is a mount point; unlike `os.path.ismount`, this also finds bind mounts."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return False
    points = (re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), line.split()[4]) for line in lines)
    return str(path.resolve()) in points


def _files_in(folder: Path, prefix: str = "") -> Iterator[str]:
    """Relative paths of all files in a folder; links, empty folders and special files are listed with their kind."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_symlink():
                yield f"{name} (a link)"
            elif entry.is_dir():
                inside = list(_files_in(Path(entry.path), f"{name}/"))
                yield from inside or [f"{name}/"]
            else:
                yield name if entry.is_file() else f"{name} (not a file)"


def _is_of_a_result(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, one) and name.count("/") == one.count("/") for one in patterns)


@contextmanager
def written_aside(
    folder: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | Path | None] = (),
    also: Iterable[str] = (),
) -> Iterator[Path]:
    """Yield an empty folder next to `folder`; rename it to `folder` when the block ends without an error.

    Readers see the old folder or the new one, never a half-written one. If the block raises, nothing is left behind.

    Args:
        overwrite: Like the other arguments, as in `refuse_existing_output`.
    """
    target = refuse_existing_output(folder, overwrite=overwrite, inputs=inputs, also=also)
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(target, wait=True):
        clean_up(target)
        refuse_existing_output(target, overwrite=overwrite, inputs=inputs, also=also)
        aside = _sibling(target, "partial")
        aside.mkdir()
        try:
            yield aside
            publish(aside, target, overwrite=overwrite, inputs=inputs, also=also)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def publish(
    new: Path,
    target: Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | Path | None] = (),
    also: Iterable[str] = (),
) -> None:
    """Replace `target` with the finished folder `new`, if `target` may still be replaced.

    If `target` may no longer be replaced, for example because someone put a file into it, the finished result is kept
    next to it, under the name given in the error.
    """
    try:
        refuse_existing_output(target, overwrite=overwrite, inputs=inputs, also=also)
        replace_folder(new, target)
    except (OSError, ValueError) as error:
        rescued = target.with_name(f"{target.name}.unpublished-{secrets.token_hex(4)}")
        os.rename(new, rescued)
        raise type(error)(f"{error} The finished result is in {str(rescued)!r}.") from error


def replace_folder(new: Path, target: Path) -> None:
    """Replace `target` with the folder `new`, with the permissions that the umask allows.

    On systems that can exchange two folders (Linux), `target` is always the old or the new one. On others it
    is missing between two renames; a kill at that moment leaves the old one as `.NAME.old-*`, which the next run puts
    back (`clean_up`).
    """
    _make_readable(new)
    if not target.exists():
        os.rename(new, target)
    elif _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = _sibling(target, "old")
        os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _make_readable(folder: Path) -> None:
    """Set the default file permissions on everything in a folder; some libraries write their files as 0600."""
    mask = _umask()
    for place, _, files in os.walk(folder):
        os.chmod(place, 0o777 & ~mask)
        for name in files:
            os.chmod(os.path.join(place, name), 0o666 & ~mask)


def clean_up(target: Path, *, keep: Path | None = None) -> None:
    """Restore or remove what killed runs into `target` left next to it. Call it while holding `only_writer`.

    Args:
        keep: An unfinished result that will be resumed.
    """
    old = leftovers(target, "old")
    if old and not target.exists():
        os.rename(old.pop(), target)  # a kill between two renames
    for left in [*old, *leftovers(target, "partial")]:
        if left != keep:
            shutil.rmtree(left, ignore_errors=True)


def leftovers(target: Path, kind: str) -> list[Path]:
    """The hidden folders of a kind ("partial", "old") that belong to `target`, newest last.

    Names are compared literally, not as glob patterns: `*` and `?` may be part of a folder's name.
    """
    name = re.compile(re.escape(f".{target.name}.{kind}-") + "(merge-)?[0-9a-f]+")
    with os.scandir(target.parent) as entries:
        found = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(8)}")


@contextmanager
def only_writer(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other runs from writing `target`. The system releases the lock when the process ends, however it ends.

    The lock file is removed while the lock is still held; a process that locked the removed file opens the new one.

    Args:
        wait: Wait for the other run instead of raising.

    Raises:
        FileExistsError: Another run is writing `target`.
    """
    lock = target.with_name(f".{target.name}.output-lock")
    busy = f"Another run is writing {str(target)!r}. Wait for it to finish, or name another folder."
    with ExitStack() as held:
        if _module("fcntl") is None:  # Windows
            from filelock import FileLock, Timeout

            try:
                held.enter_context(FileLock(lock).acquire(timeout=-1 if wait else 0))
            except Timeout as error:
                raise FileExistsError(busy) from error
        else:
            try:
                descriptor = _lock_file(lock, wait=False)
            except BlockingIOError as error:
                if not wait:
                    raise FileExistsError(busy) from error
                logger.warning("Waiting for another run that is writing %r.", str(target))
                descriptor = _lock_file(lock, wait=True)
            held.callback(os.close, descriptor)
            held.callback(lock.unlink, missing_ok=True)
        yield


def _lock_file(lock: Path, *, wait: bool) -> int:
    """Open and lock a file that was not removed while this process waited for it; returns the descriptor."""
    fcntl: Any = _module("fcntl")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError as error:
                logger.warning("%r is on a file system without locks (%s): start one run at a time.", str(lock), error)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _module(name: str) -> Any:
    """A standard-library module that is not available on all systems, or None."""
    try:
        return import_module(name)
    except ImportError:
        return None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
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
        raise ValueError(f"{relative!r} leads out of its folder {str(root)!r}; refused. Fix the file that names it.")
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


#: Identifies the state of a file: its size, and its SHA-256 if it is small, else its modification time in nanoseconds.
Stamp = tuple[int, str | int]

#: Files up to this many bytes are compared by content, larger ones by modification time.
SMALL_FILE = 1 << 20


def stamp_of(path: str | Path) -> Stamp:
    """The state of a file, to detect later changes without reading large files."""
    state = os.stat(path)
    return state.st_size, sha256_of(path) if state.st_size <= SMALL_FILE else state.st_mtime_ns


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
