"""Reads all untrusted files: JSON, YAML and front matter, with size limits and checked fields.

A config, an index, an adapter's settings, a card or a run record comes from whoever published the model. Every
function here finishes within seconds, uses memory in proportion to the file size, and fails with a one-line
`ValueError`.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Largest JSON file that is read, in bytes. Tokenizers with the largest vocabularies have about 35 MB.
MAX_JSON_BYTES = 100_000_000
#: Largest YAML file and largest front matter of a card, in bytes.
MAX_YAML_BYTES = 2_000_000
#: Deepest nesting of lists and mappings; configs and tokenizers have about ten levels.
MAX_DEPTH = 64
#: Maximum number of values in a YAML document; those behind an alias count at each use of it.
MAX_YAML_NODES = 100_000
#: Seconds that the regular expressions of an adapter may take to match the names of a model's modules.
MAX_PATTERN_SECONDS = 2.0

_REQUIRED: Any = object()
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlong = 40
_SHORT.maxlevel = 3
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n")
_FRONT_MATTER_END = re.compile(r"^---[ \t]*\r?$", re.MULTILINE)
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_KIND_NAMES = {dict: "a mapping", list: "a list", str: "a string", int: "an integer", float: "a number",
               bool: "true or false"}  # fmt: skip


def shown(value: Any) -> str:
    """`repr(value)` for an error message: at most 200 characters, for any size and nesting of the value."""
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):  # such as an integer of more than 4,300 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def one_line(error: BaseException) -> str:
    """The message of an error in one line of at most 300 characters."""
    text = " ".join(str(error)[:2000].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def read_text(path: str | Path, *, max_bytes: int | None = MAX_JSON_BYTES) -> str:
    """The text of a UTF-8 file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a regular file (reading a pipe or a device never ends), too large, or not UTF-8.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is not a regular file.")
    with open(path, "rb") as file:
        # `read(n)` allocates n bytes at once: never request more than the file has.
        size = os.fstat(file.fileno()).st_size
        data = file.read() if max_bytes is None else file.read(min(size, max_bytes) + 1)
    if max_bytes is not None and len(data) > max_bytes:
        raise ValueError(f"{str(path)!r} is larger than {max_bytes / 1e6:g} MB, the limit for such a file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def read_json(path: str | Path, *, kind: type | None = dict, max_bytes: int | None = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file.

    Args:
        kind: Type of the top-level value (dict or list); None accepts any.
        max_bytes: Largest file that is read; None for data files, which may have any size.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not valid JSON of that kind, or beyond the limits of this module.
    """
    return parse_json(read_text(path, max_bytes=max_bytes), repr(str(path)), kind=kind)


def parse_json(text: str, where: str, *, kind: type | None = dict) -> Any:
    """The content of a JSON string; `where` names it in errors."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {one_line(error)}.") from error
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"{where} must hold {_KIND_NAMES[kind]}, got {type(value).__name__} {shown(value)}.")
    _require_shallow(value, where)
    if "\\u" in text and _HALF_CHARACTER.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character.")
    return value


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file written by a user, as plain values; None if it is empty.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not valid YAML, a mapping has a duplicate key, a value is invalid for its apparent type
            (`2020-13-45`), or it is beyond the limits of this module.
    """
    return parse_yaml(read_text(path, max_bytes=MAX_YAML_BYTES), repr(str(path)))


def parse_yaml(text: str, where: str) -> Any:
    """The content of a YAML string; `where` names it in errors."""
    return _load_yaml(text, where, strings=False)


def card_metadata(text: str, where: str = "the card") -> dict[str, Any]:
    """The front matter of a model card, {} if there is none.

    Every scalar is a string, or None if empty: the metadata is only quoted, never computed with, so an invalid date is
    not a reason to fail.

    Raises:
        ValueError: The front matter is not a YAML mapping, or beyond the limits of this module.
    """
    start = _FRONT_MATTER.match(text)
    end = _FRONT_MATTER_END.search(text, start.end()) if start else None
    if start is None or end is None:
        return {}
    if end.start() - start.end() > MAX_YAML_BYTES:
        raise ValueError(f"The front matter of {where} is larger than {MAX_YAML_BYTES / 1e6:g} MB.")
    found = _load_yaml(text[start.end() : end.start()], f"The front matter of {where}", strings=True)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"The front matter of {where} must hold a mapping, got {shown(found)}.")
    return found


def field_of(
    mapping: Mapping[str, Any], key: str, kind: type | tuple[type, ...], *, where: str, default: Any = _REQUIRED
):
    """`mapping[key]`, which must be of type `kind`; `default`, if there is one, where it is missing or null.

    A bool is not accepted as an int; an int is accepted as a float. Numbers must be finite.
    """
    value = mapping.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{where} has no `{key}`; it must be {_kinds(kind)}.")
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    good = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if isinstance(value, bool) and bool not in kinds:
        good = False
    if good and isinstance(value, (int, float)) and not isinstance(value, bool):
        good = abs(value) < 2**63 if isinstance(value, int) else value - value == 0
    if not good:
        raise ValueError(f"`{key}` of {where} must be {_kinds(kind)}, got {shown(value)}.")
    return value


def check_patterns(patterns: Iterable[Any], names: Iterable[str], where: str, *, whole: bool = False) -> None:
    """Refuse regular expressions of an adapter that are invalid, or too slow on a model's module names.

    A pattern with repetitions can take exponential time, and `re` cannot be interrupted. Such patterns are tried in
    another process first, which is killed after `MAX_PATTERN_SECONDS`.

    Args:
        whole: Patterns must match the whole name, as PEFT's `target_modules` do; otherwise a match may begin at the
            start or after a dot, as with its `alpha_pattern` and `rank_pattern`.

    Raises:
        ValueError: With the pattern, or with `where` if several together take too long.
    """
    repeating = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"A module pattern of {where} must be a string, got {shown(pattern)}.")
        if len(pattern) > 10_000:
            raise ValueError(f"A module pattern of {where} has {len(pattern)} characters; at most 10000 are allowed.")
        try:
            re.compile(module_pattern(pattern, whole=whole))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{shown(pattern)} in {where} is not a valid regular expression: {one_line(error)}."
            ) from error
        if re.search(r"[*+?{]", pattern):
            repeating.append(module_pattern(pattern, whole=whole))
    if not repeating:
        return
    work = json.dumps([repeating, list(names)])
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY_PATTERNS], input=work.encode(), timeout=MAX_PATTERN_SECONDS,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
            env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
        )  # fmt: skip
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        named = "The module pattern" if len(repeating) == 1 else f"One of {len(repeating)} module patterns"
        raise ValueError(
            f"{named} in {where} takes more than {MAX_PATTERN_SECONDS:g} seconds on the names of the modules. "
            "Replace the pattern with the module names."
        ) from error


def module_pattern(pattern: str, *, whole: bool = False) -> str:
    """The regular expression with which PEFT matches module names for a `pattern` in an adapter's config."""
    return rf"(?:{pattern})\Z" if whole else rf"(.*\.)?({pattern})$"


_TRY_PATTERNS = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
"""


def _kinds(kind: type | tuple[type, ...]) -> str:
    return " or ".join(_KIND_NAMES[one] for one in (kind if isinstance(kind, tuple) else (kind,)))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {shown(twice)} in one object")
    return found


def _require_shallow(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels.")


def _load_yaml(text: str, where: str, *, strings: bool) -> Any:
    import yaml

    loader = _yaml_loader(strings)
    try:
        _require_small(yaml.parse(text, Loader=loader), where)
        return yaml.load(text, Loader=loader)
    except _BeyondLimits as error:
        raise ValueError(str(error)) from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {one_line(error)}") from error


class _BeyondLimits(Exception):
    """The document exceeds the limits; the message says which one."""


def _require_small(events: Iterable[Any], where: str) -> None:
    """Count values and depth of a YAML document from its events, before anything is built from it."""
    import yaml

    anchors: dict[str, tuple[int, int] | None] = {}  # anchor -> values and levels behind it; None while it is open
    open_nodes: list[tuple[str | None, int, int]] = []  # anchor, values so far, levels so far

    def close(anchor: str | None, count: int, depth: int) -> None:
        if anchor is not None:
            anchors[anchor] = (count, depth)
        if open_nodes:
            outer, outer_count, outer_depth = open_nodes.pop()
            open_nodes.append((outer, outer_count + count, max(outer_depth, depth + 1)))
            count, depth = open_nodes[-1][1:]
        if count > MAX_YAML_NODES:
            raise _BeyondLimits(f"{where} has more than {MAX_YAML_NODES} values, counting those behind aliases.")
        if depth + len(open_nodes) > MAX_DEPTH:
            raise _BeyondLimits(f"{where} is nested deeper than {MAX_DEPTH} levels.")

    for event in events:
        if isinstance(event, yaml.AliasEvent):
            found = anchors.get(str(event.anchor), (1, 0))  # an unknown one is reported when the document is built
            if found is None:
                raise _BeyondLimits(f"{where}: the value `&{shown(event.anchor)[1:-1]}` contains itself.")
            close(None, *found)
        elif isinstance(event, yaml.ScalarEvent):
            close(event.anchor, 1, 0)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            if event.anchor is not None:
                anchors[event.anchor] = None
            open_nodes.append((event.anchor, 1, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise _BeyondLimits(f"{where} is nested deeper than {MAX_DEPTH} levels.")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            close(*open_nodes.pop())


def _yaml_loader(strings: bool) -> type:
    """A safe loader (libyaml's if available) that refuses duplicate keys; with `strings`, scalars stay strings."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if strings:
        base = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

    class Loader(base):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            if isinstance(node, yaml.MappingNode):
                keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
                if len(set(keys)) != len(keys):
                    twice = next(key for n, key in enumerate(keys) if key in keys[:n])
                    raise ValueError(f"duplicate key {shown(twice[1])}{_line_of(node)}")
            return super().construct_mapping(node, deep=deep)

        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            return None if strings and not node.style and value in ("", "~", "null", "Null", "NULL") else value

    return Loader


def _line_of(node: Any) -> str:
    return f" in the mapping at line {node.start_mark.line + 1}" if node.start_mark is not None else ""
