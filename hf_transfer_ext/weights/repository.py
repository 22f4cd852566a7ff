"""The files of a model, in a local folder or a Hub repository."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from hf_transfer_ext.reading import field_of, read_json

#: What a model folder needs for loading and merging; optimizer states, pickles and other formats stay on the Hub.
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.gguf", "README.md"]
_HUB_NAME = re.compile(
    r"(?P<repo>[\w-][\w.-]*(?:/[\w.-]+)?)(?:@(?P<revision>[^@:+\s]+))?(?::(?P<subfolder>[^@:\\\s]+))?"
    r"(?:@(?P<revision_last>[^@:+\s]+))?"
)
_SNAPSHOT = re.compile(r"/snapshots/(?P<commit>[0-9a-f]{40})/")


@dataclass(frozen=True)
class Place:
    """Where a model, adapter or data set is.

    Args:
        path: A local path, or the id of a Hub repository.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder inside the repository, without slashes at its ends; "" for the repository itself.
    """

    path: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        """The place in one word, as it is written in a configuration."""
        revision = f"@{self.revision}" if self.revision else ""
        return self.path + revision + (f":{self.subfolder}" if self.subfolder else "")

    def inside(self, name: str) -> str:
        """The path of a file inside the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def place_of(name: str | Path, revision: str | None = None) -> Place:
    """Parse a local path or `repo[@revision][:subfolder]`; a path that exists is a path, whatever is in its name.

    Args:
        revision: The revision where `name` states none.

    Raises:
        ValueError: `name` and `revision` state different revisions, or the subfolder leads out of the repository.
    """
    text = str(name)
    found = None if os.path.lexists(text) else _HUB_NAME.fullmatch(text)
    if found is None or not set("@:") & set(text):
        return Place(text, revision)
    stated = found["revision"] or found["revision_last"]
    if stated and revision and stated != revision:
        raise ValueError(
            f"{text!r} names the revision {stated!r}, and the setting for it {revision!r}. Leave one out."
        )
    subfolder = (found["subfolder"] or "").strip("/")
    if any(part in ("", ".", "..") for part in subfolder.split("/")) and subfolder:
        raise ValueError(f"The subfolder of {text!r} leads out of the repository. Fix the path after the colon.")
    return Place(found["repo"], stated or revision, subfolder)


def local_folder(name: str | Path, *, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder of a model: the path itself if it is one, else that of `repo[@revision][:subfolder]` in the cache.

    Raises:
        FileNotFoundError: `name` is neither a folder nor a repository that can be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    place = place_of(name, revision)
    if Path(name).is_absolute() or str(name).startswith((".", "~")) or place.path.count("/") > 1:
        raise FileNotFoundError(f"There is no model folder at {str(name)!r}. Fix the path, or pass a Hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*MODEL_FILES, "*.bin"] if allow_pickle else MODEL_FILES
    if place.subfolder:
        patterns = [place.inside(pattern) for pattern in patterns]
    try:
        root = Path(snapshot_download(place.path, revision=place.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, connection_error()) as error:
        at = f" at revision {place.revision!r}" if place.revision else ""
        raise FileNotFoundError(
            f"Model {place.path!r}{at} is neither a local folder nor a "
            f"repository that can be reached on the Hub ({type(error).__name__}). Fix the name, or log in."
        ) from error
    if place.subfolder and not (root / place.subfolder).is_dir():
        raise FileNotFoundError(f"The repository {place.path!r} has no folder {place.subfolder!r} with a model.")
    return root / place.subfolder if place.subfolder else root


def file_of(folder_or_repo: str | Path, name: str, *, revision: str | None = None) -> Path | None:
    """The path of the file `name` of a local folder, or of `repo[@revision][:subfolder]` (downloaded to the cache).

    None if there is no such file or repository, or if neither the Hub nor the cache can provide it.
    """
    path = Path(folder_or_repo)
    if path.exists():
        return path / name if (path / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    place = place_of(folder_or_repo, revision)
    try:
        return Path(hf_hub_download(place.path, place.inside(name), revision=place.revision))
    except (HfHubHTTPError, HFValidationError, OSError, connection_error()):
        return None


def commit_of(name: str | Path, *, revision: str | None = None) -> str | None:
    """The commit that `repo[@revision][:subfolder]` on the Hub is at; None for a local path.

    None, too, where neither the Hub nor the cache can provide its `config.json`.
    """
    config = None if os.path.lexists(name) else file_of(name, "config.json", revision=revision)
    found = None if config is None else _SNAPSHOT.search(config.as_posix())
    return found["commit"] if found else None


def adapters_in(folder: str | Path) -> list[Path]:
    """The adapters inside a folder, by name: PEFT gives each adapter that is not `default` a folder of its own.

    [] for a folder that is an adapter or a model itself.
    """
    path = Path(folder)
    if not path.is_dir() or any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
        return []
    return sorted(one.parent for one in path.glob("*/adapter_config.json"))


def no_adapter(folder: str | Path) -> FileNotFoundError:
    """The error for a folder or repository without an adapter in its root."""
    inside = [one.name for one in adapters_in(folder)]
    hint = f" It holds several, {', '.join(inside)}: name the folder of one." if inside else ""
    return FileNotFoundError(f"There is no adapter_config.json in {str(folder)!r}; it is not a PEFT adapter.{hint}")


def base_of_adapter(adapter_config: Path) -> tuple[str, str | None]:
    """The base model that an `adapter_config.json` names, by path or Hub id, and its revision."""
    config, where = read_json(adapter_config), f"{adapter_config.name} of {str(adapter_config.parent)!r}"
    base = field_of(config, "base_model_name_or_path", str, where=where, default="")
    if not base:
        raise ValueError(
            f"Adapter {str(adapter_config.parent)!r} does not name its base model: set `base_model_name_or_path` in "
            f"its {adapter_config.name}."
        )
    return base, field_of(config, "revision", str, where=where, default=None)


def connection_error() -> type[Exception]:
    """The base of all errors of the HTTP client that huggingface_hub uses (httpx, or its successor httpx2)."""
    client = sys.modules.get("httpx2") or sys.modules.get("httpx")
    return getattr(client, "HTTPError", ConnectionError)
