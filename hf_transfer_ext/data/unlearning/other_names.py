"""Copies of rows in which another name stands in place of the one that is to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def with_other_names(
    forget: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    *,
    count: int,
    method: str,
) -> list[list[dict[str, Any]]]:
    """For each row to forget, copies with other names in all of its texts.

    Args:
        others: Rows whose names take its place, but for its own.
        columns: Schema name -> the data's own column; "name" is the one with a row's name.
        count: Copies of each row, >= 1; fewer where there are fewer other names.
        method: Who asks, for messages.

    Raises:
        ValueError: A row has no name, or its texts do not; or there is no other name.
    """
    column = columns.get("name", "name")
    pool = list(dict.fromkeys(str(row[column]) for row in others if row.get(column)))
    found = []
    for index, row in enumerate(forget):
        own = row.get(column)
        texts = [value for key, value in row.items() if key != column and isinstance(value, str)]
        if not own or not any(str(own) in text for text in texts):
            raise ValueError(
                f"{method!r} replaces the name of a row's person, and row {index} of the forget set has no column "
                f"{column!r} whose text is also in its other columns."
            )
        names = [name for name in pool if name != str(own)]
        if not names:
            raise ValueError(f"There is no other name in the column {column!r} to put in place of {own!r}.")
        chosen = [names[(index + turn) % len(names)] for turn in range(min(count, len(names)))]
        found.append([{key: _renamed(value, str(own), other) for key, value in row.items()} for other in chosen])
    return found


def _renamed(value: Any, own: str, other: str) -> Any:
    return value.replace(own, other) if isinstance(value, str) else value
