from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal

import pytest

from hf_transfer_ext import DistillationConfig, UnlearningConfig
from hf_transfer_ext.settings import (
    NONE_IS_A_VALUE,
    REQUIRED,
    ForeignFlag,
    Setting,
    Words,
    arguments_for,
    documented,
    help_of,
    run_program,
    settings_of_class,
)


class Color(Enum):
    RED = "red"
    NO = "no"


@pytest.mark.parametrize(
    "hint, written, expected",
    [
        (int, "7", 7),
        (int, 7.0, 7),
        (float, "1e-4", 1e-4),
        (float, 3, 3.0),
        (bool, "false", False),
        (bool | None, "none", None),
        (str | None, "None", None),
        (str | None, "null", None),
        (str, "none", "none"),
        (str, True, "true"),
        (int | str | None, "8", 8),
        (int | str | None, "auto", "auto"),
        (Color | str, "red", Color.RED),
        (Color | str, False, Color.NO),
        (Literal["a", "b"], "b", "b"),
        (list[str], "a, b", ["a", "b"]),
        (list[str], ["a", "b"], ["a", "b"]),
        (list[str], Words(["a", "b"]), ["a", "b"]),
        (list[str], Words(["a,", "b"]), ["a", "b"]),
        (list[int], Words(["1,2"]), [1, 2]),
        (list[Any], Words(['["a", {"b": {"c": 1e-3}}]']), ["a", {"b": {"c": 1e-3}}]),
        (list[Any], Words(["[a, {b: {c: 1e-3}}]"]), ["a", {"b": {"c": 1e-3}}]),
        (list[Any], ["a", {"b": {"c": "1e-4"}}], ["a", {"b": {"c": 1e-4}}]),
        (list[str], ["1e-4"], ["1e-4"]),
        (list[Any], '["a"]', ["a"]),
        (list[Any], Words(["none"]), []),
        (list[Any] | None, Words(["none"]), None),
        (None | str | list[str], Words(["wandb"]), "wandb"),
        (None | str | list[str], Words(["wandb", "mlflow"]), ["wandb", "mlflow"]),
        (dict[str, Any] | None, "{a: 1e-3, b: [x]}", {"a": 1e-3, "b": ["x"]}),
        (dict | str | None, '{"a": 1}', {"a": 1}),
        (dict | str | None, "a_file.json", "a_file.json"),
        (dict[str, str] | str | None, {"text": "body"}, {"text": "body"}),
    ],
)
def test_one_conversion_for_yaml_and_words(hint, written, expected):
    found = Setting("x", hint).convert(written)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "hint, written, message",
    [
        (int, "many", "`x` has to be INT, got 'many'"),
        (int, 1.5, "has to be INT"),
        (int, True, "has to be INT"),
        (int, None, "has to be INT, got None"),
        (bool, "maybe", "true/false"),
        (str, Words(["a", "b"]), "takes one value, got 'a b'"),
        (dict[str, Any], "a", "MAPPING"),
        (dict[str, Any], "{a: [}", "has to be a list"),
        (str, {"a": 1}, "has to be TEXT"),
        (Color, "rde", "Unknown value of `x` 'rde'. Did you mean 'red'"),
    ],
)
def test_what_does_not_fit_is_refused(hint, written, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        Setting("x", hint).convert(written)


def test_a_size_in_bytes_has_a_unit():
    assert Setting("max_bytes", int).convert("5GB") == 5_000_000_000
    assert Setting("max_bytes", int).convert("64") == 64


def test_none_stays_a_word_where_it_means_something():
    for name in NONE_IS_A_VALUE:
        assert Setting(name, str | None).convert("none") == "none"
        assert Setting(name, str | None).convert("null") is None


@pytest.mark.parametrize("kind", [DistillationConfig, UnlearningConfig])
def test_every_default_of_the_trainers_can_be_written_on_the_command_line(kind):
    settings = settings_of_class(kind)
    assert len(settings) == len([f for f in fields(kind) if f.init]) > 100
    for setting in settings:
        default = setting.default
        if default is REQUIRED or isinstance(default, (list, dict)):
            continue
        word = str(getattr(default, "value", default)) if default is not None else "null"
        assert setting.convert(Words([word])) == default, setting.name


def test_the_help_of_a_setting_names_the_methods_of_its_registry():
    loss = next(s for s in settings_of_class(DistillationConfig) if s.name == "loss")
    assert "reverse_kl" in loss.help and not loss.inherited
    rate = next(s for s in settings_of_class(DistillationConfig) if s.name == "learning_rate")
    assert rate.inherited
    assert "--loss TEXT" in help_of([loss], "loss") and "forward_kl" in help_of([loss], "loss")


@dataclass
class Grouped:
    """A class.

    Args:
        width: How wide,
            in all.
        depth: How deep.
    """

    width: int = 2
    depth: int = field(default=3, metadata={"help": "Own words.", "group": "shape"})


def test_help_and_group_come_from_metadata_or_the_docstring():
    width, depth = settings_of_class(Grouped, {"other": ["width"]})
    assert (width.help, width.group) == ("How wide, in all.", "other")
    assert (depth.help, depth.group) == ("Own words.", "shape")


def work(source: str, target: str, *, rank: int, dtype: str = "float32", fast: bool = False, hook: Any = None):
    """Do it.

    Args:
        source: Where from.
        rank: How many.
        fast: Be quick.
    """


def arguments(*words: str, **options: Any) -> dict[str, Any]:
    return arguments_for(work, words, program="work", about="Does it.", hidden=["hook"], **options)


def test_the_arguments_of_a_command_are_those_of_its_function():
    assert documented(work)["rank"] == "How many."
    expected = {"source": "a", "target": "b", "rank": 4, "fast": True}
    assert arguments("a", "--rank", "4", "b", "--fast") == expected
    assert arguments("--fast", "a", "b", "--rank=4") == expected
    assert arguments("a", "b", "--rank", "4", "--no-fast")["fast"] is False


def test_what_a_command_is_missing_or_does_not_know(capsys):
    for words, message in (
        (["a", "b"], "--rank is required: How many. See work --help."),
        (["a", "--rank", "1"], "TARGET is required"),
        (["a", "b", "--rnak", "1"], "Unknown option 'rnak'. Did you mean 'rank'?"),
        (["a", "b", "c", "--rank", "1"], "Unexpected argument 'c'"),
        (["a", "b", "--rank"], "`--rank` needs a value"),
        (["a", "b", "--hook", "1", "--rank", "1"], "Unknown option 'hook'"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(*words)
    with pytest.raises(SystemExit):
        arguments("--help")
    printed = capsys.readouterr().out
    assert "usage: work SOURCE TARGET [options]" in printed and "How many. (required)" in printed
    assert "hook" not in printed


def test_flags_of_other_programs_are_translated_or_refused(capsys):
    flags = {
        "quick": ForeignFlag({"fast": True}),
        "max-rank": ForeignFlag(lambda text: {"rank": text}, takes_value=True),
        "copy": ForeignFlag(note="always done"),
        "crimes": ForeignFlag(refused="not here."),
    }
    found = arguments("a", "b", "--quick", "--max-rank", "3", "--copy", foreign=flags)
    assert found == {"source": "a", "target": "b", "fast": True, "rank": 3}
    assert capsys.readouterr().err == "--copy: always done\n"
    with pytest.raises(ValueError, match="--crimes: not here"):
        arguments("a", "b", "--rank", "1", "--crimes", foreign=flags)


def test_a_mistake_is_one_line_and_status_two(capsys):
    def fail(argv):
        raise ValueError("two\nlines")

    assert run_program("work", fail, []) == 2
    assert capsys.readouterr().err == "work: two lines\n"
    assert run_program("work", fail, ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert run_program("work", lambda argv: {"a": 1}, ["x"]) == 0
    with pytest.raises(ZeroDivisionError):
        run_program("work", lambda argv: 1 / 0, [])


def test_none_is_the_empty_list_where_a_list_is_needed():
    assert Setting("membership", list[Any], ["loss_attack"]).convert(Words(["none"])) == []
    assert Setting("membership", list[Any], ["loss_attack"]).convert("null") == []
    assert Setting("adapters", list[str] | None, None).convert(Words(["none"])) is None
    assert Setting("names", list[str], []).convert(Words(["none", "all"])) == ["none", "all"]
