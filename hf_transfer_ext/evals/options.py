"""Options of metrics, attacks and suites: from their signatures, and parsed from settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from hf_transfer_ext.registry import keyword_options, unknown_name


def options_of(function: Callable[..., Any]) -> list[str]:
    """Names of a function's options: its keyword-only arguments."""
    return list(keyword_options(function))


def check_options(kind: str, name: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse an unknown option, and suggest the closest known one.

    Raises:
        ValueError: An option is not in `known`.
    """
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of the {kind} {name}", option, known or ["(it has none)"]))


def name_and_options(kind: str, spec: Any) -> tuple[Any, dict[str, Any]]:
    """`"min_k"`, `{"min_k": {"share": 0.2}}` or `("min_k", {"share": 0.2})` -> the name and its options.

    Raises:
        ValueError: `spec` has a different form.
    """
    if isinstance(spec, Mapping) and len(spec) == 1:
        spec = next(iter(spec.items()))
    if isinstance(spec, tuple) and len(spec) == 2 and (spec[1] is None or isinstance(spec[1], Mapping)):
        return spec[0], dict(spec[1] or {})
    if isinstance(spec, (Mapping, tuple, list)) or spec is None:
        raise ValueError(
            f"A {kind} must be a name, or a name with its options (`{{name: {{option: value}}}}`), got {spec!r}."
        )
    return spec, {}


def label_with(name: str, options: Mapping[str, Any]) -> str:
    """`min_k(share=0.2)`: a name with its options in parentheses."""
    return name + (f"({', '.join(f'{k}={v}' for k, v in sorted(options.items()))})" if options else "")
