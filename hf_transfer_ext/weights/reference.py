"""A model by name: `path[@revision][+lora[@revision]]`, where `path` is a folder or a Hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer_ext.registry import known_keys


@dataclass(frozen=True)
class ModelReference:
    """`path[@revision][+lora[@revision]]`; `path` is a folder or a Hub id."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        model = self.path + (f"@{self.revision}" if self.revision else "")
        if self.lora is None:
            return model
        return f"{model}+{self.lora}" + (f"@{self.lora_revision}" if self.lora_revision else "")


def parse_reference(value: Any, field_name: str) -> ModelReference:
    """Parse `path[@revision][+lora[@revision]]`, or mergekit's mapping `{model: ..., lora: ...}`."""
    if isinstance(value, Mapping):
        known_keys(value, ("model", "lora", "path", "revision"), field_name)
        if "path" in value:
            return ModelReference(str(value["path"]), value.get("revision"))
        model = parse_reference(value.get("model"), f"{field_name}.model")
        if value.get("lora") is None:
            return model
        lora = parse_reference(value["lora"], f"{field_name}.lora")
        return ModelReference(model.path, model.revision, lora.path, lora.revision)
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"`{field_name}` has to name a model (a folder or a Hub id), got {value!r}.")
    text = str(value)
    if Path(text).is_dir():
        return ModelReference(text)
    parts = [part.split("@") for part in text.split("+")]
    if len(parts) > 2 or any(len(part) > 2 or not part[0] for part in parts):
        raise ValueError(f"`{field_name}` has to read `path[@revision][+lora[@revision]]`, got {text!r}.")
    revisions = [part[1] if len(part) == 2 else None for part in parts]
    if len(parts) == 1:
        return ModelReference(parts[0][0], revisions[0])
    return ModelReference(parts[0][0], revisions[0], parts[1][0], revisions[1])
