"""Adapters of a base model, listed and filtered by tag with the real client."""

import json

import pytest

from hf_transfer_ext.cli import main
from hf_transfer_ext.hub.adapters_of import adapters_of


def card(base, *tags, relation="adapter"):
    lines = "".join(f"- {tag}\n" for tag in tags)
    return f"---\nbase_model: {base}\nbase_model_relation: {relation}\nlicense: mit\ntags:\n- x\n{lines}---\n"


@pytest.fixture
def adapters(hub):
    hub.seed("tester/a", {"README.md": card("org/base", "hf_transfer_ext", "unlearning")})
    hub.seed("tester/b", {"README.md": card("org/base", "lora")})
    hub.seed("tester/tuned", {"README.md": card("org/base", relation="finetune")})
    hub.seed("tester/other", {"README.md": card("org/other")})
    hub.seed("tester/mine", {"README.md": card("org/base", "odd")}, private=True)
    return hub


def names(found):
    return [one.repo_id for one in found]


def test_adapters_are_found_by_their_base_and_filtered(adapters):
    assert names(adapters_of("org/base")) == ["tester/a", "tester/b"]
    assert names(adapters_of("org/base", token=adapters.token)) == ["tester/a", "tester/b", "tester/mine"]
    assert names(adapters_of("org/base", tags=["hf_transfer_ext", "unlearning", "license:mit"])) == ["tester/a"]
    assert names(adapters_of("org/base", search="B", author="tester")) == ["tester/b"]
    assert names(adapters_of("org/base", author="someone")) == [] and names(adapters_of("org/base", limit=1)) == [
        "tester/a"
    ]
    assert names(adapters_of("org/none")) == []


def test_the_command_prints_lines_or_json(adapters, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", adapters.token)
    assert main(["adapters", "org/base"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3 and "private" in out.splitlines()[2] and "\x1b" not in out
    assert main(["adapters", "org/base", "--tags", "unlearning", "--json"]) == 0
    assert [one["repo_id"] for one in json.loads(capsys.readouterr().out)] == ["tester/a"]
    assert main(["adapters", "org/none"]) == 0 and "None found." in capsys.readouterr().out


def test_what_is_no_base_is_refused(adapters, monkeypatch):
    for base in ("./folder", "a/b/c", "org/base@main"):
        with pytest.raises(ValueError, match="id of a model on the Hub"):
            adapters_of(base)
    with pytest.raises(ValueError, match="at least 1"):
        adapters_of("org/base", limit=0)
    adapters.close()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses between its tries
    try:
        with pytest.raises(ConnectionError, match="cannot be listed"):
            adapters_of("org/base")
    finally:
        adapters.start(adapters.port)
