"""A recipe's settings: dataclasses filled from a YAML file, overridden on the command line, typos answered."""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_transfer_ext import reading
from hf_transfer_ext.registry import unknown_name


def parse_recipe(*types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill `types` from `--config FILE.yaml` and `--key value`; the command line wins over the file.

    Args:
        types: Dataclasses whose field names are the keys; no two share one.
        argv: The arguments after the script's name; those of this process by default, and then a mistake ends the
            process with one line on stderr and status 2.

    Returns:
        One instance of each type, in their order.

    Raises:
        ValueError: Unknown key (with the nearest known one), wrong value, or a file that is no mapping.
        FileNotFoundError: The YAML file is not there.
    """
    if argv is not None:
        return _parse(types, list(argv))
    use_all_cores()
    try:
        return _parse(types, sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def _parse(types: tuple[type, ...], argv: list[str]) -> tuple[Any, ...]:
    parser = HfArgumentParser(
        types,  # type: ignore[arg-type]
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings in YAML; each key is one of the options here.")
    parser.error = _raise  # type: ignore[method-assign, assignment]
    known = {f.name: f for t in types for f in fields(t) if f.init}
    hints = {name: hint for t in types for name, hint in typing.get_type_hints(t).items()}
    config = _config_path(argv)
    if config is not None:
        settings = read_yaml(config)
        for name in settings:
            if name not in known:
                raise ValueError(f"{config}: {unknown_name('setting', name, known)}")
        parser.set_defaults(**{name: _from_yaml(value, hints[name]) for name, value in settings.items()})
        for action in parser._actions:
            action.required = action.required and action.dest not in settings
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    for word in rest:
        if word.startswith("--"):
            raise ValueError(unknown_name("option", word[2:].split("=")[0].replace("-", "_"), known))
    if rest:
        raise ValueError(f"Unexpected argument {rest[0]!r}. Options are written as --key value.")
    for instance in parsed[: len(types)]:
        for f in fields(instance):
            value = getattr(instance, f.name, None)
            if isinstance(value, str) and value.lstrip().startswith("{") and _takes_mapping(hints[f.name]):
                setattr(instance, f.name, _mapping(f.name, value))
    return tuple(parsed[: len(types)])


def use_all_cores() -> None:
    """Give a lone process on a CPU all cores: `accelerate launch` leaves it one thread unless it is told a number.

    Several processes, and a number of threads other than 1, are left as they are.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.accelerator.is_available():
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, as plain values."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file at {str(path)!r}. Mend the path given with --config.")
    content = reading.read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} has to hold `key: value` settings, got {type(content).__name__}.")
    return content


def settings_of(*configs: Any) -> dict[str, Any]:
    """What was set, for the run record: every field of ours, and of a trainer's own what differs from its default."""
    told: dict[str, Any] = {}
    for config in configs:
        inherited = {
            name
            for base in type(config).__mro__
            if base.__module__.split(".")[0] in ("transformers", "trl")
            for name in vars(base).get("__annotations__", {})
        }
        for f in fields(config):
            value = getattr(config, f.name, None)
            default = f.default if f.default is not MISSING else None
            if f.default_factory is not MISSING:
                default = f.default_factory()
            if f.init and (f.name not in inherited or value != default):
                told[f.name] = value
    return told


def _config_path(argv: list[str]) -> str | None:
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    reader.error = _raise  # type: ignore[method-assign, assignment]
    return reader.parse_known_args(argv)[0].config


def _from_yaml(value: Any, hint: Any) -> Any:
    """YAML reads `1e-4` as a string, and a mapping for an option that the command line takes as JSON."""
    if isinstance(value, str) and float in (hint, *typing.get_args(hint)) and str not in typing.get_args(hint):
        try:
            return float(value)
        except ValueError:
            return value
    return json.dumps(value) if isinstance(value, dict) else value


def _takes_mapping(hint: Any) -> bool:
    return any(dict in (part, typing.get_origin(part)) for part in (hint, *typing.get_args(hint)))


def _mapping(name: str, text: str) -> dict[str, Any]:
    """A mapping that came as JSON, from the command line or through the argument parser."""
    return reading.parse_json(text, f"`{name}`")


def _raise(message: str) -> typing.NoReturn:
    raise ValueError(message)
