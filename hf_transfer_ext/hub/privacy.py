"""What may leave this machine: plain JSON values without secrets, and paths without the folders above them."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

#: A setting whose name is, or ends in, one of these is dropped. `eos_token` or `max_new_tokens` are no secrets.
SECRET_NAMES = (
    "hub_token", "hf_token", "auth_token", "access_token", "use_auth_token", "api_token", "api_key", "apikey",
    "password", "passwd", "secret", "secret_key", "private_key", "credentials",
)  # fmt: skip
#: Written in the place of a secret that stood inside a longer text.
REMOVED = "[removed]"

_SECRET_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|hf_oauth_[\w.-]{20,}|api_org_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|AKIA[A-Z0-9]{16})\b"
)
_URL_LOGIN = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+@")
# Two components or more, so that "/no_think" in a prompt stays; what follows "://" is an address and no path.
_POSIX_PATH = re.compile(r"(?<![\w/.~>-])(?:file://)?~?(?:/[^\s/:;,|'\"`<>()\[\]{}]+){2,}/?")
_WINDOWS_PATH = re.compile(r"(?<![\w])(?:[A-Za-z]:|\\)\\[^\s|'\"`<>]+")


def public_text(text: str) -> str:
    """`text` without tokens, logins in addresses, and the folders of absolute paths (the last component stays)."""
    text = _URL_LOGIN.sub("", _SECRET_SHAPES.sub(REMOVED, text))
    if is_absolute_path(text):
        return last_component(text)
    text = _POSIX_PATH.sub(lambda match: last_component(match[0]), text)
    return _WINDOWS_PATH.sub(lambda match: last_component(match[0]), text)


def holds_token(text: str) -> bool:
    """True where `text` holds something shaped like an access token of a well-known service."""
    return _SECRET_SHAPES.search(text) is not None


def public_value(value: Any) -> Any:
    """A plain JSON value for `value`: dictionaries without secrets, texts through `public_text`, types by name.

    Objects that JSON does not know become the name of their type, so that no `repr` with an address or a path slips
    in. Numbers that JSON does not know become the strings "nan", "inf" and "-inf".
    """
    if value is None or (isinstance(value, (bool, int)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return public_value(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (str, Path)):
        return public_text(str(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return public_value({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {public_text(str(k)): public_value(v) for k, v in value.items() if not is_secret_name(str(k))}
    if isinstance(value, (set, frozenset)):
        return sorted((public_value(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [public_value(item) for item in value]
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return public_value(value.item())  # a scalar of numpy or torch
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", type(value).__name__)


def is_secret_name(name: str) -> bool:
    """True for a setting that holds a secret, whatever stands before it: `hub_token`, `push_to_hub_token`, `token`."""
    lowered = name.lower().replace("-", "_")
    return lowered == "token" or any(lowered == s or lowered.endswith(f"_{s}") for s in SECRET_NAMES)


def is_absolute_path(text: str) -> bool:
    """True where all of `text` is one path from the root or from a home folder; "/think" is one only if it exists."""
    if "\n" in text or len(text) > 4096 or "://" in text.removeprefix("file://"):
        return False
    text = text.removeprefix("file://")
    if PureWindowsPath(text).drive and PureWindowsPath(text).is_absolute():
        return True
    if not text.startswith(("/", "~/")):
        return False
    return len(PurePosixPath(text).parts) > 2 or (len(text) > 1 and Path(text).exists())


def last_component(path: str) -> str:
    """ "/home/me/models/x/" -> "x"; a home folder, whose name is a person's, becomes "~"."""
    text = path.removeprefix("file://")
    if Path(text) == Path.home():
        return "~"
    name = PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name
    return name or "~"
