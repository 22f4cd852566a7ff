"""`repo[@revision][:subfolder]` wherever a model is named: parsed, loaded, described, private, and offline."""

import pytest
import torch
from huggingface_hub import constants
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.resize import resize_lora
from hf_transfer_ext.data.text import load_rows
from hf_transfer_ext.hub.record import describe_input, read_record
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.weights.lora import LoraFactors, save_lora
from hf_transfer_ext.weights.opened import open_model
from hf_transfer_ext.weights.reference import ModelReference, parse_reference
from hf_transfer_ext.weights.repository import Place, file_of, local_folder, place_of

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("org/model", Place("org/model")),
        ("gpt2", Place("gpt2")),
        ("org/model@v1.0", Place("org/model", "v1.0")),
        ("org/model@refs/pr/1", Place("org/model", "refs/pr/1")),
        ("org/model:adapters/a", Place("org/model", None, "adapters/a")),
        ("org/model@main:a/", Place("org/model", "main", "a")),
        ("org/model:a@main", Place("org/model", "main", "a")),
        ("/abs/model@x", Place("/abs/model@x")),
        ("C:\\models\\x", Place("C:\\models\\x")),
    ],
)
def test_names_are_parsed(name, place):
    assert place_of(name) == place
    if name == "org/model@main:a/":
        assert str(place_of(name)) == "org/model@main:a"


def test_contradictions_and_ways_out_are_refused(tmp_path, monkeypatch):
    assert place_of("org/m@v1", "v1") == Place("org/m", "v1")
    with pytest.raises(ValueError, match="Leave one out"):
        place_of("org/m@v1", "v2")
    for name in ("org/m:../x", "org/m:a/../../x", "org/m:a//b"):
        with pytest.raises(ValueError, match="leads out"):
            place_of(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model:a").mkdir()
    assert place_of("model:a") == Place("model:a")


def test_a_reference_takes_a_subfolder_on_either_side_of_the_revision():
    for text in ("org/m@v1:sub", "org/m:sub@v1"):
        assert parse_reference(text, "model") == ModelReference("org/m:sub", "v1")
    assert parse_reference("org/m:a+org/l@v2:b", "model") == ModelReference("org/m:a", None, "org/l:b", "v2")


@pytest.fixture
def several(hub, tmp_path):
    """A private repository with a model in one subfolder and adapters in two; returns the hash of its first commit."""
    tiny_llama().save_pretrained(tmp_path / "in" / "models" / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "in" / "models" / "tiny")
    for number, name in enumerate(("a", "b"), start=1):
        folder = tmp_path / "in" / "adapters" / name
        folder.mkdir(parents=True)
        factors = {MODULE: LoraFactors(torch.ones(32, 2) * number, torch.ones(2, 32))}
        save_lora(
            folder, factors, base_model="tester/base", revision=None, target_modules=["q_proj"], rank=2, replaced={},
            modules_to_save=[], fan_in_fan_out=False, dtype=torch.float32,
        )  # fmt: skip
    return hub.seed("tester/several", tmp_path / "in", private=True)


def test_a_subfolder_is_a_model_like_any_other(hub, several, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="log in"):
        local_folder("tester/several:models/tiny")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    name = f"tester/several@{several}:models/tiny"
    assert torch.equal(load_model(name).lm_head.weight, tiny_llama().lm_head.weight)
    assert len(load_tokenizer(name)) == 258 and file_of(name, "config.json") is not None
    open_model(parse_reference(name, "model")).close()
    described = describe_input(name)
    assert (described.name, described.subfolder, described.revision) == ("tester/several", "models/tiny", several)
    assert list(described.sha256) == ["model.safetensors"] and described.place == "tester/several:models/tiny"
    again = describe_input(local_folder(name))
    assert (again.place, again.revision, again.sha256) == (described.place, several, described.sha256)
    with pytest.raises(FileNotFoundError, match="no folder 'models/none'"):
        local_folder("tester/several:models/none")
    resize_lora("tester/several:adapters/b", tmp_path / "out", rank=1)
    (adapter, _) = read_record(tmp_path / "out").inputs
    assert (adapter.name, adapter.subfolder, adapter.on_hub) == ("tester/several", "adapters/b", True)


def test_what_was_pulled_once_is_there_without_a_network(hub, several, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    name = "tester/several:models/tiny"
    online = describe_input(name)
    load_model(name), load_tokenizer(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear()
    assert load_model(name).config.hidden_size == 32 and len(load_tokenizer(name)) == 258
    assert describe_input(name) == online


def test_rows_of_a_subfolder_of_a_dataset(hub):
    first = hub.seed("tester/rows", {"a/data.jsonl": '{"text": "one"}\n', "b/data.jsonl": '{"text": "two"}\n'},
                     repo_type="dataset")  # fmt: skip
    assert load_rows("tester/rows:b") == [{"text": "two"}]
    hub.seed("tester/rows", {"b/data.jsonl": '{"text": "three"}\n'}, repo_type="dataset")
    assert load_rows(f"tester/rows@{first}:b") == [{"text": "two"}]
    assert load_rows("tester/rows:b") == [{"text": "three"}]
    assert describe_input(f"tester/rows@{first}:b", role="dataset").revision == first
