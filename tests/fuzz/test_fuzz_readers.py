"""Every file that others write, damaged at random: a clear error or a value, within two seconds, and nothing written.

`HF_TRANSFER_EXT_FUZZ=5000 python -m pytest -m slow tests/fuzz` takes another number of examples than 1,000.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
import yaml
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.evals.suite import read_rows
from hf_transfer_ext.hub.card import END, START, model_card
from hf_transfer_ext.hub.lineage_tree import lineage_tree, tree_text
from hf_transfer_ext.hub.publish import earlier_card
from hf_transfer_ext.hub.record import RunInput, RunRecord, describe_input, read_record
from hf_transfer_ext.hub.report import report_card
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.merging.planning.config import load_config
from hf_transfer_ext.models.loading import load_tokenizer
from hf_transfer_ext.reproduce import reproduce
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.lora import LoraFactors, read_lora, save_lora
from hf_transfer_ext.weights.opened import open_model
from hf_transfer_ext.weights.reference import ModelReference

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.slow
EXAMPLES = int(os.environ.get("HF_TRANSFER_EXT_FUZZ", "1000"))
MERGE = {
    "merge_method": "ties", "base_model": "a/base", "dtype": "bfloat16", "tokenizer_source": "union",
    "models": [{"model": "a/x", "parameters": {"weight": 0.5, "density": [0.1, 0.9]}}, {"model": "a/y"}],
    "parameters": {"normalize": True, "weight": [{"filter": "mlp", "value": 0.3}, {"value": 1}]},
}  # fmt: skip
CARD = {"license": "mit", "base_model": ["a/b"], "tags": ["x"], "model-index": [{"name": "x", "results": []}]}
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=20),
    st.sampled_from(["", "../../x", "/etc/passwd", "(", "([a-z0-9_.]+)+!", "\x00", "é" * 500, 2**63, -1, 1e400]),
    st.recursive(
        st.none() | st.integers(),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    ),
    st.integers(1, 3).map(lambda n: json.loads("[" * 40 * n + "]" * 40 * n)),
)  # fmt: skip


def places(value, path=()):
    """All paths into a nested value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def damaged(draw, document, dump):
    """A document with up to three values replaced, removed or added, then up to three bytes changed or cut off."""
    value = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            value = draw(st.sampled_from([value, [value], None]) | ODD)
            continue
        target = value
        for key in path[:-1]:
            target = target[key]
        if draw(st.booleans()):
            target[path[-1]] = draw(ODD)
        elif isinstance(target, dict):
            target[draw(st.text(max_size=8))] = target.pop(path[-1])
        else:
            target.append(draw(ODD))
    data = bytearray(dump(value))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            at = draw(st.integers(0, len(data) - 1))
            data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data)


def as_json(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


def as_yaml(value):
    return yaml.safe_dump(value).encode("utf-8", "surrogatepass")


def as_header(value):
    text = as_json(value)
    return struct.pack("<Q", len(text)) + text + bytes(144)  # as long as the undamaged tensors say


def described(folder):
    made = RunRecord("merging", "r", {}, inputs=[describe_input(folder)])
    json.dumps(made.to_dict(), allow_nan=False).encode()
    str(model_card(made)).encode()


def traced(folder):
    node = lineage_tree(folder, search=[folder])
    tree_text(node).encode()
    json.dumps(node.to_dict(), allow_nan=False).encode()
    report_card(read_record(folder)).encode()


def kept_text(folder):
    made = str(model_card(RunRecord("merging", "r"), earlier=earlier_card(folder)))
    assert START in made and END in made
    made.encode()


def opened(folder):
    for checkpoint in open_model(ModelReference(str(folder))).opened:
        checkpoint.close()


def checkpoint(folder):
    with Checkpoint(folder) as found:
        for name in found:
            found.read(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def adapter_config(folder: Path):
    import torch

    save_lora(
        folder, {"model.layers.0.self_attn.q_proj": LoraFactors(torch.ones(4, 2), torch.ones(2, 4))}, base_model="a/b",
        revision=None, target_modules=["q_proj"], rank=2, replaced={}, modules_to_save=[], fan_in_fan_out=False,
        dtype=torch.float32,
    )  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    return {**config, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 2}}


def record_content():
    worst = Measurement("recovered at worst", 0.5, "share", False, 4, (0.4, 0.6), "a/d")
    parent = RunRecord("distillation", "r", {"a": 1}, inputs=[RunInput("a/b", "teacher", True)], metrics=[worst])
    own = RunInput("x", "model", sha256={"model.safetensors": "a" * 64}, license={"license": "llama3"}, record=parent)
    call = {"config": {"merge_method": "linear", "models": [{"model": "input:0"}]}, "lora_rank": None}
    return RunRecord(
        "merging", "hf-transfer-ext merge", {}, inputs=[own], versions={"x": "1"}, call=call,
        compared={"model": [worst]}, result={"model.safetensors": "a" * 64}, recipe_sha256="b" * 64,
    ).to_dict()  # fmt: skip


HEADER = {
    "__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
    "b": {"dtype": "BF16", "shape": [8], "data_offsets": [128, 144]},
}  # fmt: skip
INDEX = {"metadata": {"total_size": 144}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
#: What is damaged -> (file, its undamaged content, how it is written, what reads the folder, whole model beside it)
KINDS = {
    "safetensors header": ("model.safetensors", HEADER, as_header, checkpoint, False),
    "index": ("model.safetensors.index.json", INDEX, as_json, checkpoint, False),
    "config.json": ("config.json", None, as_json, opened, True),
    "adapter_config.json": ("adapter_config.json", None, as_json, read_lora, False),
    "merge YAML": ("merge.yml", MERGE, as_yaml, lambda folder: load_config(folder / "merge.yml"), False),
    "run record": ("hf_transfer_ext.json", None, as_json, described, False),
    "record for lineage": ("hf_transfer_ext.json", None, as_json, traced, False),
    "record for reproduce": ("hf_transfer_ext.json", None, as_json, lambda folder: reproduce(str(folder)), False),
    "card with own text": (
        "README.md", CARD,
        lambda v: b"---\n" + as_yaml(v) + f"\n---\nmine\n{START}\n# Title\n{END}\nmine\n".encode(), kept_text, False,
    ),
    "card": ("README.md", CARD, lambda v: b"---\n" + as_yaml(v) + b"\n---\n# Title\n", described, False),
    "tokenizer.json": ("tokenizer.json", None, as_json, load_tokenizer, True),
    "rows": ("rows.json", [{"question": "a", "answer": "b"}, {"question": "c", "answer": ["d"]}], as_json,
             lambda folder: read_rows(folder / "rows.json"), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_a_value_or_a_clear_error(tmp_path, model, kind):
    name, content, dump, read, whole = KINDS[kind]
    folder = tmp_path / "folder"
    if whole:
        shutil.copytree(model, folder)
        content = json.loads((folder / name).read_text())
        if kind == "tokenizer.json":
            content["model"]["merges"] = content["model"].get("merges", [])[:5]
    else:
        folder.mkdir()
    if kind == "adapter_config.json":
        content = adapter_config(folder)
    if name == "hf_transfer_ext.json":
        content = record_content()
    if kind == "index":
        (folder / "model-1.safetensors").write_bytes(as_header(HEADER))
    read_ok = refused = 0

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=2000, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(damaged(content, dump))
    def holds(data):
        nonlocal read_ok, refused
        (folder / name).write_bytes(data)
        before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
        tracemalloc.start()
        try:
            read(folder)
            read_ok += 1
        except (ValueError, TypeError, OSError) as error:
            refused += 1
            assert str(error) and len(str(error)) < 3000 and not isinstance(error, UnicodeError)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 40_000_000 + 50 * len(data)
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before

    holds()
    print(f"\n| {kind} | {read_ok + refused} | {read_ok} | {refused} |")
