"""Folders of results without real weights, and records for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_transfer_ext.hub.record import RunInput, RunRecord


def model_folder(folder: Path, weights: bytes, *, name: str = "model.safetensors", card: str = "") -> Path:
    """A folder with a file of weights, a config and, where given, a card."""
    folder.mkdir(parents=True)
    (folder / name).write_bytes(weights)
    config = "adapter_config.json" if name.startswith("adapter") else "config.json"
    (folder / config).write_text(json.dumps({"model_type": "llama"}))
    if card:
        (folder / "README.md").write_text(card)
    return folder


def record_of(job: str, *inputs: RunInput, **fields: Any) -> RunRecord:
    """A record of a job that read `inputs`."""
    return RunRecord(job, "hf-transfer-ext test", inputs=list(inputs), **fields)
