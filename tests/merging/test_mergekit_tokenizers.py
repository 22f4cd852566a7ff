"""Models with different tokenizers are merged as by mergekit 0.1.5: the same tokens, with the same rows."""

from __future__ import annotations

import json

import pytest
import torch
from merging.mergekit_environment import run_mergekit
from merging.planning.test_merge_vocabulary import word_tokenizer
from merging.tiny_models import load, write_model
from transformers import AutoTokenizer

from hf_transfer_ext.merging import merge

pytestmark = pytest.mark.slow

WORDS = {
    "base": ["<unk>", "a", "b", "c"],
    "left": ["<unk>", "b", "a", "x"],
    "right": ["<unk>", "y", "x", "c", "b", "a"],
}


def write(folder, words, seed):
    """GPT-NeoX, whose tokenizer class is that of its folder, without layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "gpt_neox.embed_in.weight": torch.randn(len(words), 4, generator=generator),
        "gpt_neox.final_layer_norm.weight": torch.randn(4, generator=generator),
        "gpt_neox.final_layer_norm.bias": torch.randn(4, generator=generator),
        "embed_out.weight": torch.randn(len(words), 4, generator=generator),
    }
    sizes = {"num_hidden_layers": 0, "layer_types": None, "vocab_size": len(words), "hidden_size": 4}
    path = write_model(folder, tensors, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"], **sizes)
    word_tokenizer(words).save_pretrained(folder)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / name, words, i) for i, (name, words) in enumerate(WORDS.items())}


METHODS = {
    "linear": {"merge_method": "linear"},
    "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": "base"},
    "ties": {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.6}},
}
TOKENS = {
    "new": {"source": {"kind": "model_token", "model": "right", "token": "y"}},
    "other": {"source": {"kind": "model_token", "model": "left", "token_id": 3}},
    "zero": {"source": {"kind": "zero"}},
    "a": {"source": "left", "force": True},
    "x": {"source": "left"},
}
CASES = {
    "union": {"tokenizer_source": "union"},
    "base": {"tokenizer_source": "base"},
    "a model": {"tokenizer": {"source": "right"}},
    "tokens": {"tokenizer": {"source": "union", "tokens": TOKENS}},
    "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 8}},
}


def named(value, models):
    if isinstance(value, dict):
        return {key: named(one, models) for key, one in value.items()}
    if isinstance(value, list):
        return [named(one, models) for one in value]
    return models.get(value, value) if isinstance(value, str) else value


#: Without a base model, mergekit's "base" is any of the models, another one in each process.
PAIRS = [(method, case) for method in METHODS for case in CASES if (method, case) != ("linear", "base")]


@pytest.mark.parametrize(("method", "case"), PAIRS)
def test_same_rows(tmp_path, mergekit, models, case, method):
    listed = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("left", 0.5), ("right", 0.3))]
    plan = METHODS[method]
    config = named({"models": listed, "dtype": "float32", **plan}, models)
    # The choice "base" is a word of the grammar and no model.
    config |= CASES[case] if case in ("union", "base", "padded") else named(CASES[case], models)
    theirs_folder = run_mergekit(mergekit, config, tmp_path / "theirs")
    merge(config, tmp_path / "ours")
    ours, theirs = load(tmp_path / "ours"), load(theirs_folder)
    mine, other = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (tmp_path / "ours", theirs_folder))
    assert set(mine) == set(other) and set(ours) == set(theirs)
    sizes = [
        json.loads((path / "config.json").read_text())["vocab_size"] for path in (tmp_path / "ours", theirs_folder)
    ]
    for name, tensor in ours.items():
        if name.endswith(("embed_in.weight", "embed_out.weight")):
            assert tensor.shape == theirs[name].shape and sizes[0] == sizes[1] == len(tensor)
            for token, place in mine.items():
                assert torch.allclose(tensor[place], theirs[name][other[token]], atol=1e-6), (name, token)
            if case == "padded" and method != "ties":  # which of two equal rows is trimmed is a matter of sorting
                assert torch.allclose(tensor[len(mine) :], theirs[name][len(other) :], atol=1e-6)
        else:
            assert torch.allclose(tensor, theirs[name], atol=1e-6), name
