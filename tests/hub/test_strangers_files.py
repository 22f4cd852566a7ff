"""Cards and run records that others wrote: described where they can be read, left out with a warning where not."""

import json
import time

import pytest

from hf_transfer_ext.hub.card import base_models, model_card
from hf_transfer_ext.hub.record import RunRecord, describe_input, read_record

RECORD = {
    "schema_version": 1, "job": "merging", "recipe": "r", "created": "c", "config": {}, "inputs": [], "metrics": [],
}  # fmt: skip
ITEM = {"name": "org/x", "role": "model", "on_hub": True}
METRIC = {"name": "x", "value": 1, "unit": "u", "higher_is_better": True, "examples": 1}
ALIAS_BOMB = (
    "[&b0 [lol,lol,lol,lol,lol,lol,lol,lol,lol],"
    + ",".join(f"&b{i} [{','.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 10))
    + "]"
)


def line(generations, width):
    """A record with so many generations of ancestors; each names its parent `width` times."""
    parents = {"d0": {**RECORD, "inputs": [ITEM]}}
    for i in range(1, generations):
        parents[f"d{i}"] = {**RECORD, "inputs": [{**ITEM, "on_hub": False, "record": f"d{i - 1}"}] * width}
    last = [{**ITEM, "on_hub": False, "record": f"d{generations - 1}"}] * width
    return {**RECORD, "inputs": last, "parents": parents}


def described_and_published(folder):
    """What a recipe does with an input: describe it at the start, and write record and card at the end."""
    started = time.process_time()
    made = RunRecord("unlearning", "r", {}, inputs=[describe_input(folder)])
    json.dumps(made.to_dict(), allow_nan=False).encode()
    str(model_card(made)).encode()
    assert time.process_time() - started < 10
    return made.inputs[0]


@pytest.mark.parametrize(
    "front",
    [
        f"license: mit\nx: {ALIAS_BOMB}", "license: [", "license: mit\na: " + "[" * 20_000, "license: a\nlicense: b",
        "- license", "license: mit\nx: *y", "license: mit\nx: &x [*x]",
    ],
    ids=["bomb", "yaml", "deep", "twice", "list", "alias", "itself"],
)  # fmt: skip
def test_a_card_that_cannot_be_read_is_left_out(tmp_path, caplog, front):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert described_and_published(tmp_path).license == {}
    assert f"README.md of {tmp_path.name!r}" in caplog.text and "not read" in caplog.text


@pytest.mark.parametrize("odd", ["date: 2020-13-45", "x: !!bool foo", "x: !!int foo", "x: !!timestamp foo"])
def test_a_card_with_odd_values_still_states_its_license(tmp_path, caplog, odd):
    (tmp_path / "README.md").write_bytes(f"---\nlicense: mit\nbase_model: a/b\n{odd}\n---\n\xff".encode("latin-1"))
    found = described_and_published(tmp_path)
    assert (found.license, found.base_model) == ({"license": "mit"}, ["a/b"]) and not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        {**RECORD, "job": ["x"]}, {**RECORD, "recipe": {}}, {**RECORD, "config": []}, {**RECORD, "inputs": {}},
        {**RECORD, "inputs": [5]}, {**RECORD, "inputs": [{**ITEM, "name": 5}]},
        {**RECORD, "inputs": [{**ITEM, "model_type": 5}]}, {**RECORD, "inputs": [{**ITEM, "role": ["model"]}]},
        {**RECORD, "inputs": [{**ITEM, "base_model": "a/b"}]}, {**RECORD, "inputs": [{**ITEM, "record": ["d"]}]},
        {**RECORD, "parents": []}, {**RECORD, "inputs": [{**ITEM, "record": "d"}], "parents": {"d": 3}},
        {**RECORD, "inputs": [{**ITEM, "record": "d"}],
         "parents": {"d": {**RECORD, "inputs": [{**ITEM, "record": "d"}]}}},
        {**RECORD, "job": "\ud800"}, {**RECORD, "metrics": [1]}, {**RECORD, "metrics": [{**METRIC, "dataset": 4}]},
        {**RECORD, "metrics": [{**METRIC, "interval": [1]}]}, {**RECORD, "compared": {"a": 1}},
        {**RECORD, "seed": "x"}, {**RECORD, "device": [1]}, {**RECORD, "stages": [1]},
        {"schema_version": 99}, {}, line(2000, 1), line(120, 1), "[" * 100_000, "[]", "nothing",
        json.dumps({**RECORD, "metrics": [METRIC]}).replace('"examples": 1', '"examples": 1e400'),
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_left_out(tmp_path, caplog, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "hf_transfer_ext.json").write_text(text)
    with pytest.raises(ValueError, match=r"hf_transfer_ext\.json") as error:
        read_record(tmp_path)
    assert len(str(error.value)) < 800
    assert described_and_published(tmp_path).record is None
    assert "left out" in caplog.text


@pytest.mark.parametrize(("generations", "width"), [(22, 2), (90, 3), (80, 1)])
def test_many_ways_to_one_ancestor_are_walked_once(tmp_path, generations, width):
    (tmp_path / "hf_transfer_ext.json").write_text(json.dumps(line(generations, width)))
    found = described_and_published(tmp_path)
    assert base_models(RunRecord("unlearning", "r", {}, inputs=[found])) == ["org/x"]
    assert len(found.record.history()) == generations + 1
