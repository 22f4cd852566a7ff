import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import byte_tokenizer, tiny_llama
from transformers import Gemma3TextConfig, GPT2Config, Qwen2Config

from hf_transfer_ext.evals.adapters import with_adapters
from hf_transfer_ext.evals.text.text_models import sentence_encoder
from hf_transfer_ext.hub.record import describe_input
from hf_transfer_ext.models.loading import context_length, dtype_of, load_model, load_tokenizer
from hf_transfer_ext.weights.opened import open_model
from hf_transfer_ext.weights.reference import ModelReference
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
    latest = hub.seed("tester/model", tmp_path / "other")
    commits = [(folder, None, None), ("tester/model", None, latest), ("tester/model", first, first)]
    for name, revision, commit in commits:
        assert load_model(name, revision=revision).config._commit_hash == commit
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


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(folder, tmp_path):
    adapter = get_peft_model(load_model(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == load_tokenizer(folder).get_vocab()
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")  # a damaged one is not passed over
    with pytest.raises(FileNotFoundError, match=r"adapter'.* cannot be loaded"):
        load_tokenizer(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"adapter'.* cannot be loaded"):
        load_tokenizer(tmp_path / "adapter")


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
    if where == "id":  # its own commit, and not that of its base, which its config names
        assert describe_input("tester/adapter", commit, model=loaded).revision == commit


def test_an_adapter_that_cannot_be_loaded_says_why(folder, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = tmp_path / "adapter"
    get_peft_model(load_model(folder), config).save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def with_base(name):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": name}))

    with_base(None)
    with pytest.raises(ValueError, match="does not name its base model"):
        load_model(adapter)
    with_base(str(adapter))
    with pytest.raises(ValueError, match="also an adapter"):
        load_model(adapter)
    with_base(str(folder))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="Pickles are not loaded"):
        load_model(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_pattern": {"([a-z0-9_.]+)+!": 2}}, "takes more than 2 seconds"),
        ({"target_modules": "([a-z0-9_.]+)+!"}, "takes more than 2 seconds"),
        ({"rank_pattern": {"(": 2}}, "not a valid regular expression"),
        ({"alpha_pattern": ["x"]}, "`alpha_pattern` of adapter .* must be a mapping"),
        ({"r": "x"}, "does not fit"),
        ({"base_model_name_or_path": 3}, "`base_model_name_or_path` .* must be a string"),
        ({"megatron_config": {"a": 1}}, "sets `megatron_config`"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "sets `tokenizer_kwargs`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_the_settings_of_an_adapter_are_checked(folder, tmp_path, change, message):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = tmp_path / "adapter"
    get_peft_model(load_model(folder), config).save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match=message):
        load_model(adapter)
    if "base_model_name_or_path" not in change:
        with pytest.raises(ValueError, match=message):
            with_adapters(load_model(folder), [adapter])


CODE = """
open({mark!r}, "w").write("code of the repository ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "own"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("answer", ["y\n" * 20, ""], ids=["yes", "nothing"])
def test_code_of_a_repository_does_not_run_whatever_stdin_says(hub, folder, tmp_path, monkeypatch, answer):
    mark = tmp_path / "RAN"
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    hub.seed("tester/own", folder)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    for name in ("tester/own", folder):
        for load in (load_model, load_tokenizer, context_length, sentence_encoder, skeleton):
            with pytest.raises((ValueError, OSError), match=r"code|own"):
                load(name)
    assert not mark.exists() and not asked
    loaded = load_model(folder, trust_remote_code=True)
    assert mark.exists() and type(loaded).__name__ == "Model"


def skeleton(name):
    """A model without its weights."""
    from hf_transfer_ext.weights.architecture import _skeleton

    return _skeleton(Path(open_model(ModelReference(str(name))).folder))


@pytest.mark.parametrize("name", ["tester/none", "gpt2", "/no/such/folder", "./none", "not a name"])
def test_a_name_that_leads_nowhere(hub, name):
    with pytest.raises(FileNotFoundError, match=r"none|gpt2|folder|name"):
        load_model(name)
    with pytest.raises(FileNotFoundError, match=r"none|gpt2|folder|name"):
        load_tokenizer(name)
    with pytest.raises(FileNotFoundError, match="Fix the"):
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
