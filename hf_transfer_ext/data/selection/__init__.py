"""Which rows to forget (or to train on): selections by what a model makes of the rows. Each is one file."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from hf_transfer_ext.data.selection.nearest import nearest
from hf_transfer_ext.data.selection.random import random
from hf_transfer_ext.data.selection.worst_case import worst_case
from hf_transfer_ext.registry import Registry


def check(method: Callable[..., list[int]]) -> None:
    """Refuse what cannot be called as a selection: (candidates, count), and further options by keyword."""
    parameters = list(inspect.signature(method).parameters.values())
    names = [one.name for one in parameters[:2]]
    if names != ["candidates", "count"] or any(one.kind is not one.KEYWORD_ONLY for one in parameters[2:]):
        raise ValueError(
            f"The selection `{method.__name__}` has to begin with (candidates, count) and take its options by keyword."
        )


SELECTIONS: Registry[Callable[..., list[int]]] = Registry("selection", [random, nearest, worst_case], check=check)
