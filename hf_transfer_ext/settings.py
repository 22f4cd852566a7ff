"""Settings as they are written in YAML and on a command line: one conversion by type, for dataclasses and functions.

A list is a YAML list, or on the command line `a b`, `a,b` or `[a, b]`; a mapping is a YAML mapping, or `{key: value}`;
`none` and `null` are None. Nothing here imports torch, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from numbers import Real
from typing import Any

import yaml

from hf_transfer_ext.launch import prepare_processes

#: The default of a setting that has to be given.
REQUIRED: Any = object()
#: Settings in which the word `none` is a value of its own; `null` is None there too.
NONE_IS_A_VALUE = ("report_to", "retain_loss")
#: What a wrong input raises; anything else is a fault of the program and keeps its traceback.
MISTAKES = (ValueError, TypeError, OSError, ImportError)

#: The command line that runs now: the program and its words; [] in a call from Python.
COMMAND: ContextVar[list[str]] = ContextVar("COMMAND")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", re.IGNORECASE)


class Words(list[str]):
    """The words of one option on the command line, not converted yet."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        name: Its key in YAML; `--name` on the command line.
        hint: The type that values are converted to.
        default: Value if it is not set; `REQUIRED` if it has to be.
        help: What it is, in a sentence or two.
        group: The group that it may stand in; "" for none.
        inherited: It comes from a class of transformers or TRL.
    """

    name: str
    hint: Any = Any
    default: Any = REQUIRED
    help: str = ""
    group: str = ""
    inherited: bool = False

    @property
    def takes_list(self) -> bool:
        return any(list in (kind, typing.get_origin(kind)) for kind in _kinds(self.hint))

    @property
    def takes_mapping(self) -> bool:
        return any(dict in (kind, typing.get_origin(kind)) for kind in _kinds(self.hint))

    @property
    def is_flag(self) -> bool:
        return bool in _kinds(self.hint)

    def convert(self, value: Any) -> Any:
        """`value`, from YAML or from words, as the type of this setting.

        Raises:
            ValueError: It is not of that type.
        """
        kinds = _kinds(self.hint)
        optional = type(None) in kinds or Any in kinds or self.default is None
        word = value[0] if isinstance(value, Words) and len(value) == 1 else value
        lowered = word.strip().lower() if isinstance(word, str) else ""
        nothing = ("null",) if self.name in NONE_IS_A_VALUE else ("null", "none")
        if optional and (value is None or lowered in nothing):
            return None
        if self.takes_list and str not in kinds and lowered in nothing:
            return []  # the list of nothing
        if isinstance(value, Words):
            if self.takes_list and not (str in kinds and len(value) == 1 and not value[0].startswith("[")):
                return self._listed(as_list(value, self.name))
            if len(value) != 1:
                raise ValueError(f"`{self.name}` takes one value, got {' '.join(value) or 'none'!r}.")
            value = value[0]
        for convert in _CONVERSIONS:
            found = convert(self, value, kinds)
            if found is not _NOT:
                return found
        raise ValueError(f"`{self.name}` has to be {type_name(self.hint)}, got {value!r}.")

    def _listed(self, items: list[Any]) -> list[Any]:
        kind = next(kind for kind in _kinds(self.hint) if list in (kind, typing.get_origin(kind)))
        inner = (typing.get_args(kind) or (Any,))[0]
        return [_numbers(item) if inner is Any else Setting(self.name, inner).convert(item) for item in items]


_NOT: Any = object()


def _to_bool(setting: Setting, value: Any, kinds: Sequence[Any]) -> Any:
    if bool not in kinds:
        return _NOT
    if isinstance(value, bool):
        return value
    lowered = str(value).strip().lower() if isinstance(value, (str, int)) else ""
    if str in kinds and lowered not in ("true", "false"):
        return _NOT  # another word may be a text with a meaning
    return True if lowered in _TRUE else False if lowered in _FALSE else _NOT


def _to_number(setting: Setting, value: Any, kinds: Sequence[Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _NOT
    if isinstance(value, str) and setting.name.endswith("_bytes") and (size := _SIZE.fullmatch(value.strip())):
        value = float(size[1]) * 1000 ** " KMGT".index(size[2].upper() or " ")
    try:
        number = float(value.replace("_", "") if isinstance(value, str) else value)
    except ValueError:
        return _NOT
    if int in kinds and number.is_integer():
        return int(value) if isinstance(value, (str, int)) and str(value).lstrip("+-").isdigit() else int(number)
    return number if float in kinds else _NOT


def _to_choice(setting: Setting, value: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            text = "no" if value is False else value  # YAML reads `no` as False
            known = [str(one.value) for one in kind]
            if isinstance(text, kind) or str(text) in known:
                return kind(text)
            raise ValueError(unknown_setting(f"value of `{setting.name}`", str(text), known))
        if typing.get_origin(kind) is typing.Literal:
            for choice in typing.get_args(kind):
                if str(choice) == str(value):
                    return choice
    return _NOT


def _to_container(setting: Setting, value: Any, kinds: Sequence[Any]) -> Any:
    if setting.takes_mapping:
        if isinstance(value, Mapping):
            return _numbers(dict(value))
        if isinstance(value, str) and value.lstrip().startswith("{"):
            return flow(value, setting.name)
    if setting.takes_list:
        if isinstance(value, (list, tuple)):
            return setting._listed(list(value))
        if isinstance(value, str) and (str not in kinds or value.lstrip().startswith("[")):
            return setting._listed(as_list([value], setting.name))
    return _NOT


def _to_text(setting: Setting, value: Any, kinds: Sequence[Any]) -> Any:
    if Any in kinds:
        return value
    if str not in kinds or isinstance(value, (Mapping, list)) or value is None:
        return _NOT
    return str(value).lower() if isinstance(value, bool) else str(value)


#: In this order: a text that can be a truth value or a number is one, where the type allows it.
_CONVERSIONS = (_to_bool, _to_number, _to_choice, _to_container, _to_text)


def as_list(words: Sequence[str], name: str = "the setting") -> list[Any]:
    """`["a", "b"]` of the words `a b`, of `a, b`, and of `[a, b]`, which may hold mappings too."""
    text = " ".join(words).strip()
    if text.startswith("["):
        return flow(text, name)
    return [part.strip() for word in words for part in word.split(",") if part.strip()]


def from_json(value: Any) -> Any:
    """A list or mapping that came as JSON text, as on a command line; everything else as it is.

    Raises:
        ValueError: The text starts like a list or a mapping and is not valid JSON.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"A list or a mapping has to be valid JSON, got {value!r:.200}: {error}.") from error


def flow(text: str, name: str = "the setting") -> Any:
    """A list or mapping written in one line, as JSON or as YAML."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{name}` has to be a list [a, b] or a mapping {{a: b}}, got {text!r}.") from error
    return _numbers(found)


def _numbers(value: Any) -> Any:
    """YAML reads `1e-4` as text: such texts inside lists and mappings become numbers."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def unknown_setting(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known, with the nearest known one alone: a recipe has over a hundred."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Unknown {kind} {name!r}." + (f" Did you mean {near[0]!r}?" if near else " --help lists all of them.")


def settings_of_class(kind: type, groups: Mapping[str, Sequence[str]] | None = None) -> list[Setting]:
    """The settings of a dataclass: group and help from the metadata of its fields, or the help from its docstring.

    Args:
        groups: Group -> names, for fields that do not state their group themselves.
    """
    hints = typing.get_type_hints(kind)
    grouped = {name: group for group, names in (groups or {}).items() for name in names}
    foreign = {
        name
        for base in kind.__mro__
        if base.__module__.split(".")[0] in ("transformers", "trl")
        for name in vars(base).get("__annotations__", {})
    }
    own = {name for base in kind.__mro__ if _is_ours(base) for name in vars(base).get("__annotations__", {})}
    texts = documented(kind)
    found = []
    for field in fields(kind):
        if not field.init:
            continue
        made = field.default_factory
        default = made() if made is not MISSING else REQUIRED if field.default is MISSING else field.default
        text = str(field.metadata.get("help") or texts.get(field.name, ""))
        group = str(field.metadata.get("group") or grouped.get(field.name, ""))
        inherited = field.name in foreign and field.name not in own
        found.append(Setting(field.name, hints[field.name], default, text, group, inherited))
    return found


def settings_of_function(function: Callable, hidden: Sequence[str] = ()) -> tuple[list[Setting], list[Setting]]:
    """(positional, keyword-only) parameters of a function, with the help of its docstring, without the `hidden`."""
    hints, texts = typing.get_type_hints(function), documented(function)
    positional: list[Setting] = []
    options: list[Setting] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in hidden or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = REQUIRED if parameter.default is parameter.empty else parameter.default
        setting = Setting(name, hints.get(name, Any), default, texts.get(name, ""))
        (options if parameter.kind is parameter.KEYWORD_ONLY else positional).append(setting)
    return positional, options


def documented(thing: Any) -> dict[str, str]:
    """Name -> text of the section "Args:" in the docstring of a function, or of a class and those it comes from.

    A name like `LOSSES` in it is followed by the names that the registry of its module holds.
    """
    found: dict[str, str] = {}
    for one in reversed(thing.__mro__) if isinstance(thing, type) else [thing]:
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(one.__doc__ or ""), re.MULTILINE | re.DOTALL)
        module = vars(sys.modules.get(one.__module__, object()))
        for entry in re.split(r"\n(?=    \S)", section[1]) if section else ():
            name, _, text = entry.strip().partition(":")
            found[name] = _with_names(" ".join(text.split()), module)
    return found


def _with_names(text: str, module: Mapping[str, Any]) -> str:
    for name in re.findall(r"`([A-Z][A-Z_]+)`", text):
        if hasattr(module.get(name), "items"):
            text = text.replace(f"`{name}`", f"({', '.join(module[name])})")
    return text


def read_words(
    argv: Sequence[str], settings: Sequence[Setting], groups: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Split a command line.

    Returns:
        The words of each option that is one of `settings` (`group.key` of a group), the words that belong to no
        option, and unknown options with their value, if any, as `--name=value`.
    """
    known = {setting.name: setting for setting in settings}
    chosen: dict[str, Any] = {}
    rest: list[str] = []
    unknown: list[str] = []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or word == "--":
            rest.append(word)
            continue
        written, has_value, value = word[2:].partition("=")
        name = written.replace("-", "_")
        if name.removeprefix("no_") in known and name not in known and known[name.removeprefix("no_")].is_flag:
            chosen[name.removeprefix("no_")] = Words(["false"])
        elif name not in known and name.partition(".")[0] not in groups:
            unknown.append(word)
        elif has_value:
            chosen[name] = Words([value])
        elif name in known and known[name].is_flag:
            is_value = queue and queue[0].lower() in (*_TRUE, *_FALSE)
            chosen[name] = Words([queue.pop(0) if is_value else "true"])
        else:
            words = Words()
            takes_list = name not in known or known[name].takes_list
            while queue and not queue[0].startswith("--") and (takes_list or not words):
                words.append(queue.pop(0))
            if not words:
                raise ValueError(f"`--{written}` needs a value: --{written} VALUE.")
            chosen[name] = words
    return chosen, rest, unknown


#: `--quiet` of a command.
QUIET = Setting("quiet", bool, False, "No progress bar.")


@dataclass(frozen=True)
class ForeignFlag:
    """A flag that people bring from another program, and what it is here.

    Args:
        becomes: Settings that it stands for; a function of its value where it takes one.
        note: Printed where the flag is taken and there is nothing to do for it.
        refused: Why it cannot be taken, and what to do instead.
    """

    becomes: Mapping[str, Any] | Callable[[str], Mapping[str, Any]] | None = None
    takes_value: bool = False
    note: str = ""
    refused: str = ""


def arguments_for(
    function: Callable,
    argv: Sequence[str] | None,
    *,
    program: str,
    about: str,
    hidden: Sequence[str] = (),
    extra: Sequence[Setting] = (),
    foreign: Mapping[str, ForeignFlag] | None = None,
) -> dict[str, Any]:
    """The arguments of `function` from a command line: its signature and docstring are the declaration.

    Positional parameters are given by place, keyword-only ones as `--name value`. `--help` prints them and exits.

    Args:
        program: "hf-transfer-ext merge".
        about: What the command does, for its help.
        hidden: Parameters that a command line does not set.
        extra: Options of the command itself.
        foreign: Flag without dashes -> what it is here.

    Raises:
        ValueError: An argument is missing, unknown, or of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    positional, options = settings_of_function(function, hidden)
    options += extra
    if {"-h", "--help"} & set(argv):
        names = " ".join(s.name.upper() for s in positional)
        print(f"usage: {program} {names} [options]\n\n{textwrap.fill(about, 100)}\n")
        print(help_of(positional, "arguments", dashes=False), help_of(options, "options"), sep="\n\n")
        if foreign:
            print("\nTaken as well: " + ", ".join(f"--{name}" for name, flag in foreign.items() if not flag.refused))
        raise SystemExit(0)
    flags = {
        name: Setting(name.replace("-", "_"), str if flag.takes_value else bool)
        for name, flag in (foreign or {}).items()
    }
    chosen, rest, unknown = read_words(argv, [*options, *flags.values()])
    if unknown:
        name = unknown[0][2:].split("=")[0].replace("-", "_")
        raise ValueError(unknown_setting("option", name, [s.name for s in options]))
    arguments = _translated(chosen, foreign or {})
    if len(rest) > len(positional):
        raise ValueError(f"Unexpected argument {rest[len(positional)]!r}. Options are written as --name value.")
    arguments |= {setting.name: Words([word]) for setting, word in zip(positional, rest, strict=False)}
    for setting in (*positional, *options):
        if setting.name in arguments:
            arguments[setting.name] = setting.convert(arguments[setting.name])
        elif setting.default is REQUIRED:
            is_option = setting not in positional
            written = f"--{setting.name.replace('_', '-')}" if is_option else setting.name.upper()
            raise ValueError(f"{written} is required: {setting.help or 'give it.'} See {program} --help.")
    return arguments


def _translated(chosen: Mapping[str, Words], foreign: Mapping[str, ForeignFlag]) -> dict[str, Any]:
    by_name = {name.replace("-", "_"): (name, flag) for name, flag in foreign.items()}
    arguments: dict[str, Any] = {}
    for name, words in chosen.items():
        written, flag = by_name.get(name, ("", None))
        if flag is None:
            arguments[name] = words
        elif not flag.takes_value and words == ["false"]:
            raise ValueError(f"--no-{written} is not known here; leave it out.")
        elif flag.refused:
            raise ValueError(f"--{written}: {flag.refused}")
        else:
            if flag.note:
                print(f"--{written}: {flag.note}", file=sys.stderr)
            for key, value in (flag.becomes(words[0]) if callable(flag.becomes) else flag.becomes or {}).items():
                arguments.setdefault(key, value)
    return arguments


def help_of(settings: Sequence[Setting], title: str, *, dashes: bool = True, width: int = 100) -> str:
    """One block of help: each setting with its type, its text and its default."""
    lines = [f"{title}:"]
    for setting in settings:
        name = f"--{setting.name}" if dashes else setting.name.upper()
        kind = "" if setting.is_flag or not dashes else f" {type_name(setting.hint)}"
        required = setting.default is REQUIRED
        default = "" if required or setting.default in ("", [], {}) else f"(default: {_shown(setting.default)})"
        text = " ".join(part for part in (setting.help, default if dashes else "") if part)
        if required and dashes:
            text = f"{text} (required)".strip()
        lines.append(f"  {name}{kind}")
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return str(getattr(value, "value", value)) if not isinstance(value, list) else ", ".join(map(str, value))


def type_name(hint: Any) -> str:
    """A type in a user's words: `int | None` -> "INT"."""
    names = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true/false", list: "LIST", dict: "MAPPING", Any: "VALUE"}
    shown = []
    for part in _kinds(hint):
        kind = typing.get_origin(part) or part
        if kind is typing.Literal:
            shown.append("/".join(map(str, typing.get_args(part))))
        elif kind is not type(None):
            is_enum = isinstance(kind, type) and issubclass(kind, Enum)
            shown.append("/".join(str(e.value) for e in kind) if is_enum else names.get(kind, "TEXT"))
    return " or ".join(dict.fromkeys(shown if len(shown) == 1 else [s for s in shown if s != "TEXT"] or shown[:1]))


def _kinds(hint: Any) -> list[Any]:
    """The members of a union, flat."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    return [hint]


def require_numbers(
    values: Mapping[str, Any], owner: Callable, *, taken: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, Any]:
    """Those of `values` that `owner` annotates as numbers; a whole number written as 8.0 becomes 8.

    For settings that arrive from Python, where a text is a mistake and not a number to be read. Nothing is known about
    an `owner` whose annotations cannot be resolved (a function of other code).

    Args:
        owner: A dataclass, or the function or class whose arguments they are.
        taken: Setting -> further values that mean something.

    Raises:
        ValueError: A text, a truth value, NaN, infinity, or a fraction where a whole number is needed; with its name.
    """
    arguments = owner if is_dataclass(owner) or not isinstance(owner, type) else owner.__init__  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(arguments)
    except NameError:
        return {}
    found = {}
    for name, value in values.items():
        kinds = _kinds(hints.get(name, Any))
        if (int in kinds or float in kinds) and Any not in kinds:
            found[name] = value if value in (taken or {}).get(name, ()) else _as_number(name, value, kinds)
    return found


def _as_number(name: str, value: Any, kinds: Sequence[Any]) -> Any:
    origins = [typing.get_origin(kind) or kind for kind in kinds]
    others = tuple(kind for kind in origins if isinstance(kind, type) and kind not in (int, float))
    if isinstance(value, others):
        return value
    is_whole = float not in kinds
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (is_whole and int(value) != value):
        names = ["None" if kind is type(None) else kind.__name__ for kind in others]
        needed = " or ".join(["a whole number" if is_whole else "a finite number", *names])
        raise ValueError(f"`{name}` has to be {needed}, got {type(value).__name__} {value!r}.")
    return int(value) if is_whole else value


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] not in ("transformers", "trl", "builtins")


def run_program(program: str, run: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> int:
    """Run a command or recipe; a user's mistake becomes one line on stderr and status 2.

    Args:
        run: Called with the arguments; an int that it returns is the status.
        argv: The arguments, those of this process by default. `--debug` among them shows the traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    before = COMMAND.set([program, *words])
    try:
        prepare_processes()
        status = run(words)
    except MISTAKES as error:
        if debug:
            traceback.print_exc()
        told = " ".join(str(error).split()) or type(error).__name__
        unsure = "" if isinstance(error, (ValueError, OSError)) else " (--debug shows where)"
        print(f"{program}: {told}{unsure}", file=sys.stderr)
        return 2
    finally:
        COMMAND.reset(before)
    return status if isinstance(status, int) else 0
