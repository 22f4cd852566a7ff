import datetime
import os
import time

import pytest

from hf_transfer_ext.reading import (
    MAX_DEPTH,
    card_metadata,
    check_patterns,
    field_of,
    one_line,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
    shown,
)

ALIAS_BOMB = (
    "[&b0 [lol,lol,lol,lol,lol,lol,lol,lol,lol],"
    + ",".join(f"&b{i} [{','.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 10))
    + "]"
)
NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(50)]


def test_files_come_back_as_they_were_written(tmp_path):
    (tmp_path / "a.json").write_bytes('\ufeff{"é": [1, 2.5, null, "😀", 1e400]}'.encode())
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None, "😀", float("inf")]}
    (tmp_path / "a.yaml").write_text("a: &x {b: 1}\nc: {<<: *x, d: [*x, *x]}\nday: 2020-01-02\n")
    shared = {"b": 1}
    assert read_yaml(tmp_path / "a.yaml") == {
        "a": shared, "c": {"b": 1, "d": [shared, shared]}, "day": datetime.date(2020, 1, 2)
    }  # fmt: skip
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * (MAX_DEPTH + 2) + "1" + "}" * (MAX_DEPTH + 2), "nested deeper than 64"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "must hold a mapping, got list"),
        ("null", "must hold a mapping, got NoneType"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"a": "\\ud800"}', "surrogate pair"),
        ('{"\\udfff": 1}', "surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_json(text, "the file")
    assert str(error.value).startswith("the file") and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a: {ALIAS_BOMB}", "more than 100000 values"),
        ("a: &x [*x]", "contains itself"),
        ("a: " + "[" * 100_000, "nest"),
        ("- " * 20_000, "nested deeper than 64"),
        (
            "".join(f"a{n}: &a{n} [{f'*a{n - 1}' if n else ''}]\n" for n in range(MAX_DEPTH + 2)),
            "nested deeper than 64",
        ),
        ("- a\n" * 100_001, "more than 100000 values"),
        ("a: *nothing", "undefined alias"),
        ("a: 2020-13-45", "month"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", "duplicate key 'a' in the mapping at line 1"),
        ("? [a]\n: b", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text, message):
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text, "the file")
    assert time.process_time() - started < 2
    assert str(error.value).startswith("the file") and len(str(error.value)) < 500


def test_files_that_are_not_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json("/dev/zero")
    (tmp_path / "large.json").write_text("[" + " " * 100 + "]")
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "large.json", max_bytes=100)
    assert read_json(tmp_path / "large.json", kind=list, max_bytes=None) == []
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8 text \\(byte 7\\)"):
        read_text(tmp_path / "latin.json")


def test_front_matter_is_texts_alone():
    text = (
        "---\nlicense: mit\ndate: 2020-13-45\nx: !!bool foo\nn: 1\nempty:\nnothing: null\n"
        'quoted: "null"\nbase_model: [a/b, c]\n---\n# Title\n---\nnot: this\n'
    )
    assert card_metadata(text) == {
        "license": "mit", "date": "2020-13-45", "x": "foo", "n": "1", "empty": None, "nothing": None,
        "quoted": "null", "base_model": ["a/b", "c"],
    }  # fmt: skip
    assert card_metadata(text.replace("\n", "\r\n"))["license"] == "mit"
    for none in ("", "# Title", "---\nlicense: mit\n", "text\n---\nlicense: mit\n---\n", "---\n---\n"):
        assert card_metadata(none) == {}


@pytest.mark.parametrize(
    "text", ["- a", "just text", "a: [", f"a: {ALIAS_BOMB}", "a: " + "[" * 20_000, "a: 1\na: 2", "x" * 3_000_000]
)
def test_front_matter_that_is_refused(text):
    with pytest.raises(ValueError, match="front matter of the card") as error:
        card_metadata(f"---\n{text}\n---\n")
    assert len(str(error.value)) < 500


def test_errors_show_some_of_a_value():
    assert shown("a") == "'a'" and shown({"r": 8}) == "{'r': 8}"
    nested: list = []
    nested.append(nested)
    for large in ("x" * 10**6, list(range(10**6)), {str(n): n for n in range(10**5)}, nested, 10**5000):
        assert len(shown(large)) <= 200
    assert len(one_line(ValueError("a\n" * 10**6))) <= 300 and one_line(KeyError()) == "KeyError"


def test_fields_have_the_type_that_is_needed():
    found = {"r": 8, "alpha": 16, "name": "x", "on": True, "none": None, "list": [1]}
    assert field_of(found, "r", int, where="w") == 8 and field_of(found, "alpha", float, where="w") == 16
    assert (
        field_of(found, "none", int, where="w", default=3) == field_of(found, "gone", int, where="w", default=3) == 3
    )
    assert field_of(found, "name", (str, list), where="w") == "x"
    with pytest.raises(ValueError, match="w has no `gone`; it must be an integer"):
        field_of(found, "gone", int, where="w")
    for key, kind in (("on", int), ("on", float), ("name", int), ("r", str), ("list", dict), ("r", bool)):
        with pytest.raises(ValueError, match=f"`{key}` of w must be"):
            field_of(found, key, kind, where="w")
    for number in (float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match="`x` of w must be a number"):
            field_of({"x": number}, "x", float, where="w")


def test_patterns_that_a_model_can_be_matched_with():
    check_patterns(["q_proj", r".*\.(q|v)_proj", "^model", r"layers\.[0-9]+\."], NAMES, "the adapter")
    check_patterns([r"(?!.*vision).*\.q_proj"], NAMES, "the adapter", whole=True)


@pytest.mark.parametrize("pattern", ["([a-z0-9_.]+)+!", r"(\w+\.?)+!", "(.*)*(.*)*(.*)*!"])
def test_patterns_that_never_end(pattern):
    started = time.perf_counter()
    with pytest.raises(ValueError, match="the adapter takes more than 2 seconds"):
        check_patterns([pattern], NAMES, "the adapter")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("pattern", ["(", "*", "(?P<a", "[", 3, None, "x" * 20_000, "(" * 5000 + ")" * 5000])
def test_patterns_that_are_not_valid(pattern):
    with pytest.raises(ValueError, match="the adapter"):
        check_patterns([pattern], NAMES, "the adapter")
