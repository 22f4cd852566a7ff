import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import byte_tokenizer, tiny_llama
from transformers import Gemma3TextConfig, GPT2Config, Qwen2Config

from hf_transfer_ext.models.loading import context_length, dtype_of, load_model, load_tokenizer
from hf_transfer_ext.weights.repository import local_folder


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(model):
    return {name: value for name, value in model.state_dict().items()}


def same(model, other):
    one, two = weights(model), weights(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_model_by_path_by_id_and_by_revision(hub, folder, tmp_path):
    first = hub.seed("tester/model", folder)
    tiny_llama(1).save_pretrained(tmp_path / "other")
    hub.seed("tester/model", tmp_path / "other")
    assert same(load_model(folder), tiny_llama())
    assert same(load_model("tester/model"), tiny_llama(1))
    old = load_model("tester/model", revision=first, dtype="bfloat16")
    assert old.dtype == torch.bfloat16 and same(old, tiny_llama().to(torch.bfloat16))
    snapshot = local_folder("tester/model", revision=first)
    assert snapshot.name == first and same(load_model(snapshot), tiny_llama())
    assert local_folder(folder) == folder
    assert context_length(old) == context_length(folder) == 512


def test_a_tokenizer_by_path_by_id_and_by_revision(hub, folder):
    first = hub.seed("tester/model", folder)
    hub.seed("tester/model", {"x.txt": "no tokenizer here"})
    for tokenizer in (load_tokenizer(folder), load_tokenizer("tester/model", revision=first)):
        assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    with pytest.raises(FileNotFoundError, match=r"tester/model.*cannot be loaded"):
        load_tokenizer("tester/model")


@pytest.mark.parametrize("config", [GPT2Config(), Qwen2Config(), Gemma3TextConfig()], ids=lambda c: c.model_type)
def test_a_model_without_a_tokenizer_does_not_give_an_empty_one(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


def test_pickles_are_neither_fetched_nor_read_unless_asked(hub, folder):
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.seed("tester/pickled", folder)
    assert not (local_folder("tester/pickled") / "pytorch_model.bin").exists()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_model("tester/pickled")
    assert (local_folder("tester/pickled", allow_pickle=True) / "pytorch_model.bin").exists()
    assert same(load_model("tester/pickled", use_safetensors=False), tiny_llama())


@pytest.mark.parametrize("where", ["path", "id", "snapshot"])
def test_an_adapter_comes_on_its_own_base(hub, folder, tmp_path, where):
    first = hub.seed("tester/base", folder)
    tiny_llama(1).save_pretrained(tmp_path / "newer")
    hub.seed("tester/base", tmp_path / "newer")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(load_model("tester/base", revision=first), config, revision=first)
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == first
    commit = hub.seed("tester/adapter", tmp_path / "adapter")
    hub.seed("tester/adapter", {"x.txt": "the adapter is gone"})
    loaded = {
        "path": lambda: load_model(tmp_path / "adapter"),
        "id": lambda: load_model("tester/adapter", revision=commit),
        "snapshot": lambda: load_model(local_folder("tester/adapter", revision=commit)),
    }[where]()
    assert isinstance(loaded, PeftModel) and same(loaded, adapted)


def test_an_adapter_that_cannot_be_loaded_says_why(folder, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = tmp_path / "adapter"
    get_peft_model(load_model(folder), config).save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def with_base(name):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": name}))

    with_base(None)
    with pytest.raises(ValueError, match="names no base"):
        load_model(adapter)
    with_base(str(adapter))
    with pytest.raises(ValueError, match="an adapter too"):
        load_model(adapter)
    with_base(str(folder))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="Pickles are not read"):
        load_model(adapter)


@pytest.mark.parametrize("name", ["tester/none", "gpt2", "/no/such/folder", "./none", "not a name"])
def test_a_name_that_leads_nowhere(hub, name):
    with pytest.raises(FileNotFoundError, match=r"none|gpt2|folder|name"):
        load_model(name)
    with pytest.raises(FileNotFoundError, match=r"none|gpt2|folder|name"):
        load_tokenizer(name)
    with pytest.raises(FileNotFoundError, match="Mend the"):
        local_folder(name)


def test_a_revision_that_is_not_there(hub, folder):
    hub.seed("tester/model", folder)
    for load in (load_model, load_tokenizer, local_folder):
        with pytest.raises(FileNotFoundError, match="tester/model"):
            load("tester/model", revision="v9")


def test_names_of_dtypes():
    assert dtype_of("bfloat16") is dtype_of("torch.bfloat16") is dtype_of(torch.bfloat16) is torch.bfloat16
    assert dtype_of(None) == dtype_of("auto") == "auto"
    with pytest.raises(ValueError, match="dtype"):
        dtype_of("float33")
