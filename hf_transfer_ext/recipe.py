"""A recipe's settings: dataclasses filled from a YAML file, overridden on the command line, typos answered."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from hf_transfer_ext import reading
from hf_transfer_ext.settings import (
    REQUIRED,
    Setting,
    help_of,
    read_words,
    settings_of_class,
    unknown_setting,
)

#: The configurations that the package brings.
CONFIGS = Path(__file__).parent / "recipes" / "configs"


def setting(default: Any, group: str, help: str) -> Any:
    """A field of a recipe's settings, in its group, with its help. A list or dictionary is copied for each run."""
    metadata = {"group": group, "help": help}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(metadata=metadata) if default is REQUIRED else field(default=default, metadata=metadata)


def parse_recipe(
    *types: type, argv: Sequence[str] | None = None, groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[Any, ...]:
    """Fill `types` from `--config FILE.yaml` and `--key value`; the command line wins over the file.

    Settings may stand in groups: `teacher: {revision: main}` is `teacher_revision: main`, `loss: {name: reverse_kl}`
    is `loss: reverse_kl`, and on the command line `--loss.name reverse_kl`. A mapping under the name of a group is
    that group; any other value under it is the setting of that name.

    Args:
        types: Dataclasses whose field names are the keys; no two share one. A field states its group in its metadata
            (`{"group": "teacher", "help": ...}`).
        argv: The arguments after the script's name; those of this process by default.
        groups: Group -> fields, for fields of `types` that do not state theirs.

    Returns:
        One instance of each type, in their order.

    Raises:
        ValueError: Unknown key (with the nearest known one), wrong value, or a file that is not a mapping.
        FileNotFoundError: The YAML file is not there.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = [setting for kind in types for setting in settings_of_class(kind, groups)]
    if {"-h", "--help"} & set(argv):
        print(recipe_help(types, settings))
        raise SystemExit(0)
    names = list(dict.fromkeys(setting.group for setting in settings if setting.group))
    config = Setting("config", str | None, None)
    words, rest, unknown = read_words(argv, [*settings, config], names)
    if unknown:
        name = unknown[0][2:].split("=")[0].replace("-", "_")
        raise ValueError(unknown_setting("option", name, [*(s.name for s in settings), *names]))
    if rest:
        raise ValueError(f"Unexpected argument {rest[0]!r}. Options are written as --key value.")
    path = config.convert(words.pop("config", None))
    content = read_yaml(path) if path is not None else {}
    values = flattened(content, settings, f"{path}: ", "setting")
    grouped: dict[str, Any] = {}
    for name, value in words.items():
        group, is_grouped, key = name.partition(".")
        if is_grouped:
            grouped.setdefault(group, {})[key] = value
    values |= flattened({n: v for n, v in words.items() if "." not in n}, settings, "", "option")
    values |= flattened(grouped, settings, "", "option")
    known = {setting.name: setting for setting in settings}
    converted = {name: known[name].convert(value) for name, value in values.items()}
    missing = [s for s in settings if s.default is REQUIRED and s.name not in converted]
    if missing:
        raise ValueError(f"`{missing[0].name}` is required: {missing[0].help or 'set it'}.".replace("..", "."))
    return tuple(
        kind(**{field.name: converted[field.name] for field in fields(kind) if field.name in converted})
        for kind in types
    )


def flattened(content: Mapping[str, Any], settings: Sequence[Setting], where: str, kind: str) -> dict[str, Any]:
    """Settings by their flat names; those of a group are taken out of it.

    Raises:
        ValueError: An unknown key, a key in the wrong group, or one that is given twice.
    """
    known = {setting.name: setting for setting in settings}
    groups: dict[str, list[str]] = {}
    for setting in settings:
        if setting.group:
            groups.setdefault(setting.group, []).append(setting.name)
    found: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if name in found:
            raise ValueError(f"{where}`{name}` is set twice: by itself and in its group. Leave one out.")
        found[name] = value

    for key, value in content.items():
        is_group = isinstance(value, Mapping) and key in groups
        if is_group and not (key in known and known[key].takes_mapping):
            for inner, one in value.items():
                put(_member(str(inner), key, groups, known, where, kind), one)
        elif key in known:
            put(key, value)
        elif key in groups:
            raise ValueError(f"{where}`{key}` is a group of settings and has to hold `key: value`, got {value!r}.")
        else:
            raise ValueError(where + unknown_setting(kind, key, [*known, *groups]))
    return found


def _member(
    key: str, group: str, groups: Mapping[str, Sequence[str]], known: Mapping[str, Setting], where: str, kind: str
) -> str:
    """The flat name of a group's key: `revision` of `teacher` is `teacher_revision`, `name` is `teacher`."""
    for name in (f"{group}_{key}", key, group if key == "name" else ""):
        if name in groups[group]:
            return name
    if key in known:
        own = known[key].group
        place = f"in the group `{own}`" if own else "outside of groups"
        raise ValueError(f"{where}`{key}` does not belong to `{group}`: it stands {place}.")
    members = [*groups[group], *(name.removeprefix(f"{group}_") for name in groups[group])]
    raise ValueError(f"{where}In `{group}`: {unknown_setting(kind, key, members)}")


def recipe_help(types: Sequence[type], settings: Sequence[Setting]) -> str:
    """The settings of a recipe: its own by group first, then what it inherits from the trainers of Hugging Face."""
    parts = [
        f"usage: {Path(sys.argv[0]).name} [--config FILE.yaml] [--key value ...]",
        (types[0].__doc__ or "").strip().splitlines()[0],
        "A list is written `a b`, `a,b` or `[a, b]`, a mapping `{key: value}`, no value `none`. --debug shows the "
        "traceback of an error.",
    ]
    own = [setting for setting in settings if not setting.inherited]
    for group in dict.fromkeys(setting.group for setting in sorted(own, key=lambda s: not s.group)):
        title = f"{group} (in YAML also `{group}: {{...}}`)" if group else "settings"
        parts.append(help_of([setting for setting in own if setting.group == group], title))
    inherited = [setting for setting in settings if setting.inherited]
    if inherited:
        parts.append(help_of(inherited, "inherited from transformers and TRL"))
    return "\n\n".join(parts)


def use_all_cores() -> None:
    """Give a lone process on a CPU all cores: `accelerate launch` leaves it one thread unless given a number.

    Several processes, and a number of threads other than 1, are left as they are.
    """
    import torch

    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.accelerator.is_available():
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


def find_config(path: str | Path) -> Path:
    """A configuration by its path, or by the path of one that the package brings.

    `recipes/configs/distill/demo.yaml` and `distill/demo.yaml` name the package's own from any folder.

    Raises:
        FileNotFoundError: There is neither.
    """
    path = Path(path)
    parts = path.parts[2:] if path.parts[:2] == ("recipes", "configs") else path.parts
    own = CONFIGS.joinpath(*parts)
    if path.is_file():
        return path
    if not path.is_absolute() and ".." not in parts and own.is_file():
        return own
    own_ones = ", ".join(sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("*/*.y*ml")))
    raise FileNotFoundError(f"There is no config file at {str(path)!r}. Fix the path. The package brings {own_ones}.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, as plain values."""
    content = reading.read_yaml(find_config(path))
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} has to hold `key: value` settings, got {type(content).__name__}.")
    return content


def settings_of(*configs: Any) -> dict[str, Any]:
    """What was set, for the run record: every field of ours, and of a trainer's own what differs from its default."""
    return {name: value for name, value, inherited in _values(configs) if not inherited}


def inherited_defaults(*configs: Any) -> dict[str, Any]:
    """The rest of the settings: fields inherited from transformers and TRL that were left at their defaults."""
    return {name: value for name, value, inherited in _values(configs) if inherited}


def _values(configs: Sequence[Any]) -> list[tuple[str, Any, bool]]:
    """(name, value, whether it is an inherited default) of each field."""
    found = []
    for config in configs:
        for setting in settings_of_class(type(config)):
            value = getattr(config, setting.name, None)
            default = None if setting.default is REQUIRED else setting.default
            found.append((setting.name, value, setting.inherited and value == default))
    return found
