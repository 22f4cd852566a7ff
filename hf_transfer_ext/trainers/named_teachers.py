"""Several teachers, as `DistillationConfig` names them: one mapping for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_transfer_ext.losses.slopes import Form
from hf_transfer_ext.registry import keyword_options, unknown_name
from hf_transfer_ext.teachers.cache import CacheSpec, planned_spec
from hf_transfer_ext.teachers.server import ServerTeacher

#: How several teachers are combined: by fixed weights, by their confidence at each token, by a column of the data, or
#: by weights that are learned during the training.
COMBINATIONS = ("weight", "confidence", "column", "learned")
#: What a teacher is named by; an entry has one of them.
_KINDS = ("model", "adapter", "cache", "server")
#: Settings of an entry -> the kinds that they belong to.
_OF_KIND = {
    "revision": ("model",),
    "dtype": ("model",),
    "options": ("model", "server"),
    "server_model": ("server",),
    "tokenizer": ("server", "cache"),
}


@dataclass(frozen=True)
class NamedTeacher:
    """One entry of `teachers`.

    Args:
        model: Folder or Hub id; or
        adapter: name of an adapter on the student, or "base"; or
        cache: folder of a complete teacher cache, or `hf://datasets/OWNER/NAME[@REVISION]`; or
        server: address of a server, with `server_model`, the model's name there.
        name: What data and messages call it; by default the last part of what it is named by.
        weight: Its share, > 0, where teachers are combined by weight; 1 by default.
        revision, dtype: Of a model.
        tokenizer: Folder or Hub id of the tokenizer of a server's or a cache's model, where a span loss reads texts in
            its tokens; of a server by default that of `server_model`, if it is a folder or a Hub id.
        options: Further arguments of `from_pretrained` for a model, or of `ServerTeacher`.
    """

    model: str | None = None
    adapter: str | None = None
    cache: str | None = None
    server: str | None = None
    server_model: str | None = None
    name: str = ""
    weight: float | None = None
    revision: str | None = None
    dtype: str = "auto"
    tokenizer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(entry: Any, place: int) -> NamedTeacher:
        """An entry as it stands in YAML.

        Raises:
            ValueError: It is not a mapping with one teacher, or a setting does not belong to it.
        """
        where = f"Entry {place} of `teachers`"
        known = [one.name for one in fields(NamedTeacher)]
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} has to be a mapping such as {{model: FOLDER, weight: 2}}, got {entry!r}.")
        for key in entry:
            if key not in known:
                raise ValueError(f"{where}: {unknown_name('setting', key, known)}")
        kinds = [kind for kind in _KINDS if entry.get(kind)]
        if len(kinds) != 1:
            raise ValueError(f"{where} needs one of {', '.join(_KINDS)}, got {' and '.join(kinds) or 'none'}.")
        for name, owners in _OF_KIND.items():
            if entry.get(name) and kinds[0] not in owners:
                raise ValueError(f"{where}: `{name}` goes with {' or '.join(owners)}, not with {kinds[0]}.")
        if entry.get("server") and not entry.get("server_model"):
            raise ValueError(f"{where} needs `server_model`, the model's name on the server.")
        weight = entry.get("weight")
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and 0 < weight < math.inf):
            raise ValueError(
                f"{where}: `weight` has to be a number > 0, got {weight!r}. Leave a teacher out that does not count."
            )
        if entry.get("server"):
            check_server_options(entry.get("options") or {})
        name = entry.get("name") or Path(str(entry[kinds[0]]).rstrip("/")).name
        return NamedTeacher(**{**entry, "options": dict(entry.get("options") or {}), "name": str(name)})

    def form(self, temperature: float) -> Form:
        """The form of its rows."""
        spec = self._spec(temperature)
        return spec.form if spec is not None else "sparse" if self.server is not None else "dense"

    def lists_likeliest(self, temperature: float) -> bool:
        """Whether its rows show its likeliest tokens: all but those of a cache of random draws alone do."""
        spec = self._spec(temperature)
        return spec is None or bool(spec.top)

    def _spec(self, temperature: float) -> CacheSpec | None:
        return None if self.cache is None else planned_spec(self.cache, temperature)


def named_teachers(entries: Sequence[Any], by: str) -> list[NamedTeacher]:
    """The entries of `teachers`.

    Raises:
        ValueError: There are none, two have one name, or a weight would have no effect.
    """
    found = [NamedTeacher.of(entry, place) for place, entry in enumerate(entries)]
    names = [one.name for one in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(f"`teachers` need different names, got {names or 'no entry'}. Set `name` in the entries.")
    weighed = [one.name for one in found if one.weight is not None]
    if by != "weight" and weighed:
        raise ValueError(
            f"The teacher {weighed[0]!r} has a `weight`, but `teachers_by` is {by!r}, which does not read it."
        )
    return found


def check_server_options(options: Mapping[str, Any]) -> None:
    """Refuse options that `ServerTeacher` does not have; its key comes from the environment."""
    known = [name for name in keyword_options(ServerTeacher) if name != "api_key"]
    for name in options:
        if name not in known:
            raise ValueError(unknown_name("option of a teacher on a server", name, known))
