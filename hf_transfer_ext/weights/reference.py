"""A model by name: `path[@revision][+lora[@revision]]`; `path` is a folder, a Hub id, or `repo:subfolder`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Parse `path[@revision][+lora[@revision]]`, or mergekit's mapping `{model: ..., lora: ...}`.

    If a string can be parsed in several ways, as with `+` or `@` in a folder name, existing folders win.
    """
    if isinstance(value, Mapping):
        known_keys(value, ("model", "lora", "path", "revision"), field_name)
        if "path" in value:
            return ModelReference(_expanded(str(value["path"])), value.get("revision"))
        model = parse_reference(value.get("model"), f"{field_name}.model")
        if value.get("lora") is None:
            return model
        lora = parse_reference(value["lora"], f"{field_name}.lora")
        return ModelReference(model.path, model.revision, lora.path, lora.revision)
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"`{field_name}` must name a model (a folder or a Hub id), got {value!r}.")
    text = str(value)
    found = [one for one in _readings(text) if one is not None]
    if not found:
        raise ValueError(f"`{field_name}` must have the form `path[@revision][+lora[@revision]]`, got {text!r}.")
    return max(found, key=_existing)  # the first of equally good ones


def _readings(text: str) -> Iterator[ModelReference | None]:
    """All ways to parse a reference; a folder may have `+` and `@` in its name."""
    for path, revision in _parts(text):
        yield ModelReference(path, revision)
    for i, sign in enumerate(text):
        if sign == "+":
            for path, revision in _parts(text[:i]):
                for lora, lora_revision in _parts(text[i + 1 :]):
                    yield ModelReference(path, revision, lora, lora_revision)


def _parts(text: str) -> list[tuple[str, str | None]]:
    """All ways to parse `path[@revision]`; `~` becomes the home folder."""
    ways: list[tuple[str, str | None]] = [(text, None)] if _is_folder(text) or not set("+@") & set(text) else []
    for i, sign in enumerate(text):
        if sign == "@" and (_is_folder(text[:i]) or not set("+@") & set(text[:i] + text[i + 1 :])):
            ways.append((text[:i], text[i + 1 :]))
    return [_with_subfolder(_expanded(path), revision) for path, revision in ways if path and revision != ""]


def _with_subfolder(path: str, revision: str | None) -> tuple[str, str | None]:
    """`repo@revision:subfolder` as (`repo:subfolder`, `revision`): no revision holds a colon."""
    revision, colon, subfolder = (revision or "").partition(":")
    return path + colon + subfolder, revision or None


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _is_folder(path: str) -> bool:
    try:
        return bool(path) and Path(_expanded(path)).is_dir()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or no home folder
        return False


def _existing(reference: ModelReference) -> tuple[int, int]:
    """How well a parsed reference matches the disk: more existing folders are better, then fewer parts."""
    parts = [reference.path] + ([reference.lora] if reference.lora is not None else [])
    return sum(_is_folder(part) for part in parts) * 2 - len(parts), -sum(
        revision is not None for revision in (reference.revision, reference.lora_revision)
    )
