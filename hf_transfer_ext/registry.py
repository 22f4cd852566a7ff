"""A registry of functions: looked up by name, with a suggestion for a misspelled one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar

Function = TypeVar("Function", bound=Callable)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Error message for an unknown name: the name itself, the closest known name, and all known names.

    Example: *Unknown merge method 'tis'. Did you mean 'ties'? Available: linear, ties.*
    """
    names = sorted(known)
    near = get_close_matches(str(name)[:200], names, n=1, cutoff=0.5)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {name!r:.200}.{suggestion} Available: {', '.join(names)}."


def known_keys(content: Any, known: tuple[str, ...], where: str) -> None:
    """Raise `ValueError` for anything but a mapping, and for keys that nothing reads."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping with some of {', '.join(known)}, got {content!r:.200}.")
    for key in content:
        if key not in known:
            raise ValueError(f"In {where}: {unknown_name('key', key, known)}")


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's options: its keyword-only arguments, with their defaults (`Parameter.empty` without one)."""
    parameters = signature(function).parameters.items()
    return {name: one.default for name, one in parameters if one.kind is Parameter.KEYWORD_ONLY}


def declared_as(kind: type, what: str, decorator: str) -> Callable[[Any], None]:
    """A check for registries whose methods declare what they need: it refuses a plain function.

    Args:
        kind: The class that the decorator makes.
        what: What the methods are, as in "edit method".
        decorator: How to write it, with its module.
    """

    def check(method: Any) -> None:
        if not isinstance(method, kind):
            name = getattr(method, "__name__", method)
            raise ValueError(f"{name!r} is not of the kind {what}. Declare what it needs with {decorator}.")

    return check


class Registry(Generic[Function]):
    """Functions by name. `registry["nmae"]` raises a `ValueError` that suggests the closest name.

    Args:
        kind: What the functions are, as error messages call them ("distillation loss").
        functions: The built-in functions; other code adds its own with `@registry.register`. With `package`, names
            may stand for functions that are imported when they are first looked up.
        package: The package in which a name's function is in the file of the same name.
        check: Called with each function before it is registered; raises a `ValueError` if the function does not meet
            the requirements, so that it fails here and not when it is first used.
    """

    def __init__(
        self,
        kind: str,
        functions: Iterable[Function | str] = (),
        *,
        package: str | None = None,
        check: Callable[[Function], None] | None = None,
    ) -> None:
        self.kind, self.package = kind, package
        self._check = check
        #: name -> function, or None for one that is not imported yet
        self._functions: dict[str, Function | None] = {}
        for function in functions:
            if isinstance(function, str):
                self._functions[function] = None
            else:
                self.register(function)

    def register(self, function: Function) -> Function:
        name = function.__name__
        if name in self._functions and self[name] is not function:
            raise ValueError(f"A {self.kind} named {name!r} is already registered. Give the new one another name.")
        if self._check is not None:
            self._check(function)
        self._functions[name] = function
        return function

    def __getitem__(self, name: str) -> Function:
        if not isinstance(name, str) or name not in self._functions:
            raise ValueError(unknown_name(self.kind, name, self._functions))
        found = self._functions[name]
        if found is None:
            found = getattr(import_module(f"{self.package}.{name}"), name)
            if self._check is not None:
                self._check(found)
            self._functions[name] = found
        return found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._functions

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def items(self) -> Iterable[tuple[str, Function]]:
        return [(name, self[name]) for name in self._functions]
