"""Models with different tokenizers: each token keeps its row, wherever it stands, and missing rows have a source."""

from __future__ import annotations

import json

import pytest
import torch
from merging.tiny_models import load, write_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_transfer_ext.merging import merge

ROWS = 12  # of every model: more than its tokenizer has tokens


def word_tokenizer(words):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0])


def make_model(folder, words, seed, template=None):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": torch.randn(ROWS, 4, generator=generator),
        "model.norm.weight": torch.ones(4),
        "lm_head.weight": torch.randn(ROWS, 4, generator=generator),
    }
    tokenizer = word_tokenizer(words)
    tokenizer.chat_template = template
    # Of a type whose tokenizer class is that of its folder; Qwen's and Llama's own classes add tokens of theirs.
    sizes = {"num_hidden_layers": 0, "layer_types": None, "vocab_size": ROWS, "hidden_size": 4}
    path = write_model(folder, tensors, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"], **sizes)
    tokenizer.save_pretrained(folder)
    return path


@pytest.fixture
def three(tmp_path):
    return {
        "base": make_model(tmp_path / "base", ["<unk>", "a", "b", "c"], 0, "{{ one }}"),
        "left": make_model(tmp_path / "left", ["<unk>", "b", "a", "x"], 1, "{{ two }}"),
        "right": make_model(tmp_path / "right", ["<unk>", "y", "x", "c", "b", "a"], 2, "{{ two }}"),
    }


def merged(tmp_path, config, **more):
    merge({"merge_method": "linear", **config, **more}, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    return load(tmp_path / "out"), tokenizer, content


def listed(three, *names):
    return [{"model": three[name], "parameters": {"weight": 0.5}} for name in names]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_union(tmp_path, three, name):
    config = {"models": listed(three, "left", "right"), "base_model": three["base"], "tokenizer_source": "union"}
    tensors, tokenizer, content = merged(tmp_path, config)
    vocabulary = tokenizer.get_vocab()
    assert set(vocabulary) == {"<unk>", "a", "b", "c", "x", "y"}
    assert content["vocab_size"] == len(tensors[name]) == 6
    base, left, right = (load(three[key])[name] for key in ("base", "left", "right"))

    def row(token):
        return tensors[name][vocabulary[token]]

    assert torch.allclose(row("a"), (left[2] + right[5]) / 2)
    assert torch.allclose(row("b"), (left[1] + right[4]) / 2)
    assert torch.allclose(row("x"), (left[3] + right[2]) / 2)
    assert torch.allclose(row("c"), (base[3] + right[3]) / 2)  # the left model lacks c and takes the base's
    assert torch.allclose(row("y"), right[1])  # only the right model has y
    assert tokenizer.tokenize("a x y") == ["a", "x", "y"]


def test_tokens_without_a_row_are_left_out(tmp_path, three):
    """A tokenizer may name more tokens than its model has rows for."""
    words = ["<unk>", *(f"w{i}" for i in range(ROWS + 3))]
    config = {"models": listed(three, "left"), "tokenizer_source": "union"}
    config["models"].append({"model": make_model(tmp_path / "long", words, 5), "parameters": {"weight": 0.5}})
    _, tokenizer, content = merged(tmp_path, config)
    vocabulary = tokenizer.get_vocab()
    assert f"w{ROWS - 2}" in vocabulary and f"w{ROWS - 1}" not in vocabulary
    assert content["vocab_size"] == len(vocabulary) == 4 + ROWS - 1


def test_vocabulary_of_the_base_or_of_a_model(tmp_path, three):
    config = {"models": listed(three, "left", "right"), "base_model": three["base"]}
    tensors, tokenizer, _ = merged(tmp_path / "1", config, tokenizer_source="base")
    assert tokenizer.get_vocab() == {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    left, right = (load(three[key])["lm_head.weight"] for key in ("left", "right"))
    assert torch.allclose(tensors["lm_head.weight"][1], (left[2] + right[5]) / 2)
    tensors, tokenizer, _ = merged(tmp_path / "2", config, tokenizer={"source": three["left"]})
    assert tokenizer.get_vocab() == {"<unk>": 0, "b": 1, "a": 2, "x": 3}
    assert torch.allclose(tensors["lm_head.weight"][1], (left[1] + right[4]) / 2)


def test_tokens_with_a_source_and_padding(tmp_path, three):
    source = {"kind": "model_token", "model": three["right"], "token": "y"}
    tokens = {
        "new": {"source": source},
        "zero": {"source": {"kind": "zero"}},
        "a": {"source": three["left"], "force": True},
    }
    config = {"models": listed(three, "left", "right"), "base_model": three["base"]}
    tokenizer_plan = {"source": "base", "tokens": tokens, "pad_to_multiple_of": 8}
    tensors, tokenizer, content = merged(tmp_path, config, tokenizer=tokenizer_plan)
    weights, vocabulary = tensors["lm_head.weight"], tokenizer.get_vocab()
    left, right = (load(three[key])["lm_head.weight"] for key in ("left", "right"))
    assert content["vocab_size"] == len(weights) == 8
    assert torch.allclose(weights[vocabulary["new"]], right[1])
    assert torch.equal(weights[vocabulary["zero"]], torch.zeros(4))
    assert torch.allclose(weights[vocabulary["a"]], left[2])  # forced on the right model too
    assert torch.allclose(weights[6], weights[:6].mean(0), atol=1e-6) and torch.equal(weights[6], weights[7])


def test_a_token_that_is_not_there(tmp_path, three):
    config = {"models": listed(three, "left", "right"), "base_model": three["base"]}
    for source, message in (
        ({"kind": "model_token", "model": three["left"], "token": "y"}, "has no token 'y'"),
        ({"kind": "model_token", "model": three["left"], "token_id": 99}, "has no token 99"),
        (three["left"], "has no token 'c'"),
        (None, "has no `source`"),
    ):
        with pytest.raises(ValueError, match=message):
            merged(tmp_path, config, tokenizer={"source": "base", "tokens": {"c": {"source": source}}})
    assert not (tmp_path / "out").exists()


def test_changes_from_a_base_are_rearranged_too(tmp_path, three):
    config = {"models": listed(three, "left"), "base_model": three["base"], "tokenizer_source": "base"}
    tensors, _, _ = merged(tmp_path, config, merge_method="task_arithmetic")
    base, left = (load(three[key])["lm_head.weight"] for key in ("base", "left"))
    assert torch.allclose(tensors["lm_head.weight"][1], base[1] + 0.5 * (left[2] - base[1]))
    assert torch.allclose(tensors["lm_head.weight"][3], base[3])


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, "{{ one }}"), ("auto", "{{ two }}"), ("{{ mine }}", "{{ mine }}")]
)
def test_chat_template(tmp_path, three, asked, expected):
    config = {"models": listed(three, "left", "right"), "base_model": three["base"], "tokenizer_source": "base"}
    if asked:
        config["chat_template"] = asked
    _, tokenizer, _ = merged(tmp_path, config)
    assert tokenizer.chat_template == expected


def test_a_template_by_an_unknown_name_is_refused(tmp_path, three):
    with pytest.raises(ValueError, match=r"Did you mean 'chatml'.* Or paste the text"):
        merged(tmp_path, {"models": listed(three, "left"), "chat_template": "chat_ml"})


def test_special_tokens_follow_a_tokenizer_of_another_model(tmp_path, three):
    """The ids of config and generation_config are those of the tokens in the tokenizer that was taken."""
    for name, eos in (("base", "b"), ("right", "y")):
        tokenizer = AutoTokenizer.from_pretrained(three[name])
        tokenizer.eos_token = eos
        tokenizer.save_pretrained(three[name])
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": tokenizer.eos_token_id}))
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "top_k": 5}))
    models = listed(three, "base", "right")
    *_, content = merged(tmp_path, {"models": models, "tokenizer": {"source": three["right"]}})
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert content["eos_token_id"] == 1  # "y" of the new tokenizer
    assert generation == {"eos_token_id": [1, 4, 3], "top_k": 5}  # "y", and "b" and "c" where they are now


def test_a_head_bias_and_embeddings_of_each_layer_follow_the_vocabulary(tmp_path, three):
    for i, name in enumerate(three):
        tensors = load(three[name])
        tensors["model.embed_tokens_per_layer.weight"] = tensors["model.embed_tokens.weight"][:, :2] + i
        tensors["lm_head.bias"] = torch.arange(ROWS, dtype=torch.float32) + 100 * i
        tensors["model.token_type_embeddings.weight"] = torch.randn(2, 4)
        config = json.loads((tmp_path / name / "config.json").read_text())
        write_model(tmp_path / name, tensors, **config)
    left, right = load(three["left"]), load(three["right"])
    models = listed(three, "left", "right")
    tensors, tokenizer, _ = merged(tmp_path, {"models": models, "tokenizer": {"source": "union"}})
    row = tokenizer.get_vocab()["b"]
    assert tensors["lm_head.bias"][row] == (left["lm_head.bias"][1] + right["lm_head.bias"][4]) / 2
    name = "model.embed_tokens_per_layer.weight"
    assert torch.allclose(tensors[name][row], (left[name][1] + right[name][4]) / 2)
    assert tensors["model.token_type_embeddings.weight"].shape == (2, 4)
