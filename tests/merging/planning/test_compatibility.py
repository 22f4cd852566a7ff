"""Models with equal names and shapes of tensors that still calculate different things are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merging.tiny_models import family, load, names, random_tensors, write_model

from hf_transfer_ext.merging import merge


def linear(*models, **more):
    return {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
        **more,
    }


def refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        merge(config, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4}, r"differ in `num_attention_heads` of their config.json \((2 and 4|4 and 2)\)"),
        ({"num_key_value_heads": 2}, "differ in `num_key_value_heads`"),
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, r"different types \(gemma, qwen2\)"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "Layer 1 of .*`layer_types`"),
    ],
)
def test_same_shapes_with_another_meaning(tmp_path, changes, message):
    one = write_model(tmp_path / "one", random_tensors(1))
    two = write_model(tmp_path / "two", random_tensors(2), **changes)
    refused(tmp_path, linear(one, two), message)
    base = {"merge_method": "task_arithmetic", "base_model": one}
    refused(tmp_path, linear(two, **base), message)
    # A base that only lends its config may be anything.
    merge(linear(two, base_model=one), tmp_path / "lent")


def test_activations_by_two_names(tmp_path):
    one = write_model(tmp_path / "one", random_tensors(1), hidden_act="silu")
    two = write_model(tmp_path / "two", random_tensors(2), hidden_act="swish")
    three = write_model(tmp_path / "three", random_tensors(2), hidden_act="gelu")
    merge(linear(one, two), tmp_path / "merged")
    refused(tmp_path, linear(one, three), "`hidden_act`")


def test_llama_and_mistral_are_built_alike(tmp_path):
    one = write_model(tmp_path / "one", random_tensors(1), model_type="llama", layer_types=None)
    two = write_model(tmp_path / "two", random_tensors(2), model_type="mistral", layer_types=None)
    merge(linear(one, two), tmp_path / "out")
    assert set(load(tmp_path / "out")) == set(names())


def test_layer_kinds_count_where_layers_meet(tmp_path):
    """Layers 0 and 1 of one model meet layers 1 and 2 of the other, which are of the same kinds."""
    one = write_model(tmp_path / "one", random_tensors(1), layer_types=["a", "b", "a"])
    two = write_model(tmp_path / "two", random_tensors(2), layer_types=["b", "a", "b"])

    def slices(first, second):
        sources = [{"model": one, "layer_range": first}, {"model": two, "layer_range": second}]
        sources = [{**source, "parameters": {"weight": 1.0}} for source in sources]
        return {"merge_method": "linear", "slices": [{"sources": sources}]}

    refused(tmp_path, slices([0, 2], [0, 2]), "Layer 0 of .* of kind 'a' .* of kind 'b'")
    merge(slices([0, 2], [1, 3]), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["layer_types"] == ["a", "b"]


def test_layers_that_are_missing(tmp_path):
    _, tuned = family(tmp_path, 1)
    path = Path(tuned[0], "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 4}))
    refused(tmp_path, linear(tuned[0]), "should have 4 layers by its config.json, but its files hold 3")


def test_a_tied_and_an_untied_model(tmp_path):
    """The head of the tied one is its embeddings; the result has a head of its own, whichever model comes first."""
    tensors = random_tensors(0)
    untied = write_model(tmp_path / "untied", tensors)
    del tensors["lm_head.weight"]
    tied = write_model(tmp_path / "tied", tensors, tie_word_embeddings=True)
    merge(linear(untied, tied), tmp_path / "out")
    assert "lm_head.weight" in load(tmp_path / "out")
    merge(linear(tied, untied), tmp_path / "other")
    assert torch.equal(load(tmp_path / "other")["lm_head.weight"], load(tmp_path / "out")["lm_head.weight"])
    for folder in ("out", "other"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["tie_word_embeddings"] is False
