"""A cache of scores: JSON lines files, named by a fingerprint of the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serializable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def model_fingerprint(model: Any, adapter: str | None = None) -> str:
    """SHA-256 of the config, of every weight (name, dtype, shape and bytes), and of the adapter in use.

    It changes with any weight, so a result is never reused for another model. Takes about one second per gigabyte.
    """
    known = hashlib.sha256()
    active = adapter if adapter is not None else str(getattr(model, "active_adapter", None))
    known.update(digest([active, str(getattr(model, "config", None))]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        known.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        known.update(_bytes(tensor))
    return known.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


class ScoreCache:
    """Key -> JSON value, appended as work is done. An interrupted run resumes after the last complete line.

    Args:
        folder: Folder of the files; every process writes its own file and reads all. None disables the cache.
        fingerprint: Identifies the source of the values; each fingerprint has its own files.
        process: Index of this process.
    """

    def __init__(self, folder: str | Path | None, fingerprint: str, process: int = 0) -> None:
        self._values: dict[str, Any] = {}
        self._file: Path | None = None
        if folder is None:
            return
        place = Path(folder) / fingerprint[:32]
        place.mkdir(parents=True, exist_ok=True)
        self._file = place / f"process-{process}.jsonl"
        for path in sorted(place.glob("process-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line that was incomplete when a run was interrupted
                self._values[entry["key"]] = entry["value"]
        if self._file.exists() and not self._file.read_bytes().endswith(b"\n"):
            with open(self._file, "a", encoding="utf-8") as file:
                file.write("\n")

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        self._values[key] = value
        if self._file is not None:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
