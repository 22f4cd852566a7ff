"""Small files of a model, be it a folder or a Hub repository."""

from __future__ import annotations

import sys
from pathlib import Path


def file_of(folder_or_repo: str | Path, name: str, *, revision: str | None = None) -> Path | None:
    """The path of the file `name` of a local folder, or of a Hub repository (downloaded to the cache).

    None where there is no such file or repository, or where neither the Hub nor the cache can give it.
    """
    path = Path(folder_or_repo)
    if path.exists():
        return path / name if (path / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(str(folder_or_repo), name, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError, connection_error()):
        return None


def connection_error() -> type[Exception]:
    """The base of all errors of the HTTP client that huggingface_hub uses (httpx, or its successor httpx2)."""
    client = sys.modules.get("httpx2") or sys.modules.get("httpx")
    return getattr(client, "HTTPError", ConnectionError)
