"""A registry is a list of functions that is looked up by name and answers a typo with a suggestion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

Function = TypeVar("Function", bound=Callable)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """The one sentence for a name that is not known: what arrived, the nearest known name, and all of them.

    Example: *Unknown merge method 'tis'. Did you mean 'ties'? Available: linear, ties.*
    """
    names = sorted(known)
    near = get_close_matches(str(name)[:200], names, n=1, cutoff=0.5)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {name!r:.200}.{suggestion} Available: {', '.join(names)}."


def known_keys(content: Any, known: tuple[str, ...], where: str) -> None:
    """Refuse what is no mapping, and keys that nothing would read."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} has to be a mapping with some of {', '.join(known)}, got {content!r:.200}.")
    for key in content:
        if key not in known:
            raise ValueError(f"In {where}: {unknown_name('key', key, known)}")


class Registry(Generic[Function]):
    """Functions by their own name. `registry["nmae"]` raises a `ValueError` that names the nearest function.

    Args:
        kind: What the functions are, in the words of an error message ("distillation loss").
        functions: The functions that the package itself brings; other code adds its own with `@registry.register`.
        check: Called with each function before it is registered; raises a `ValueError` that says what the function
            would have to be. A function that could not be used later is refused here.
    """

    def __init__(
        self, kind: str, functions: Iterable[Function] = (), *, check: Callable[[Function], None] | None = None
    ) -> None:
        self.kind = kind
        self._check = check
        self._functions: dict[str, Function] = {}
        for function in functions:
            self.register(function)

    def register(self, function: Function) -> Function:
        name = function.__name__
        if self._functions.get(name, function) is not function:
            raise ValueError(f"A {self.kind} named {name!r} is registered already. Give the new one its own name.")
        if self._check is not None:
            self._check(function)
        self._functions[name] = function
        return function

    def __getitem__(self, name: str) -> Function:
        if not isinstance(name, str) or name not in self._functions:
            raise ValueError(unknown_name(self.kind, name, self._functions))
        return self._functions[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._functions

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def items(self) -> Iterable[tuple[str, Function]]:
        return self._functions.items()
