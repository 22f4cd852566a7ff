"""No tensor is lost by its name: parts of models, unequal files, buffers, copies, depth of each stack."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from merging.tiny_models import load, random_tensors, write_model
from safetensors.torch import save_file
from tiny_architectures import tiny
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from hf_transfer_ext.merging import merge


def linear(*models, weight=0.5, **more):
    listed = [{"model": str(model), "parameters": {"weight": weight}} for model in models]
    return {"merge_method": "linear", "models": listed, **more}


def saved(folder, name, seed=0):
    tiny(name, seed).save_pretrained(folder)
    return folder


def changed(folder, **tensors):
    """Add tensors to a saved model; None takes one away."""
    stored = load(folder) | tensors
    save_file({k: v.contiguous() for k, v in stored.items() if v is not None}, folder / "model.safetensors")
    return folder


def test_modules_that_cover_a_part_keep_the_rest(tmp_path):
    one, two = (saved(tmp_path / f"t{i}", "T5ForConditionalGeneration", i) for i in range(2))
    modules = {"encoder": {"models": linear(one, two)["models"]}}
    report = merge({"merge_method": "linear", "modules": modules}, tmp_path / "out")
    first, second, out = load(one), load(two), load(tmp_path / "out")
    assert set(out) == set(first)
    for name, tensor in out.items():
        wanted = (first[name] + second[name]) / 2 if name.startswith("encoder") else first[name]
        assert torch.allclose(tensor, wanted, atol=1e-6), name
    assert any("belong to none of the modules" in note for note in report.notes)


def test_a_module_that_no_model_has(tmp_path):
    model = saved(tmp_path / "t", "T5ForConditionalGeneration")
    modules = {"encodr": {"models": linear(model)["models"]}}
    with pytest.raises(ValueError, match="Did you mean 'encoder'"):
        merge({"merge_method": "linear", "modules": modules}, tmp_path / "out")


def test_slices_of_a_decoder_count_its_own_layers(tmp_path):
    model = saved(tmp_path / "t", "T5ForConditionalGeneration")  # 2 and 3 layers
    slices = {"slices": [{"sources": [{"model": str(model), "layer_range": [0, 1]}]}] * 2}
    one = {"slices": [{"sources": [{"model": str(model), "layer_range": [0, 1]}]}]}
    merge({"merge_method": "passthrough", "modules": {"encoder": one, "decoder": slices}}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (1, 2)
    _, info = T5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_layer_tensor_that_the_first_model_lacks(tmp_path):
    tensors = random_tensors(0)
    whole = write_model(tmp_path / "whole", tensors)
    part = write_model(tmp_path / "part", {k: v for k, v in tensors.items() if "layers.0.mlp.up" not in k})
    sources = [{"model": model, "layer_range": [0, 2], "parameters": {"weight": 1}} for model in (part, whole)]
    with pytest.raises(ValueError, match=r"lacks a tensor.*layers.0.mlp.up_proj"):
        merge({"merge_method": "linear", "slices": [{"sources": sources}]}, tmp_path / "out")


@pytest.mark.parametrize("base_first", [True, False])
def test_tensors_of_multi_token_prediction_are_carried(tmp_path, base_first):
    base, tuned = (saved(tmp_path / f"q{i}", "Qwen3_5ForCausalLM", i) for i in range(2))
    extra = {"mtp.fc.weight": torch.randn(4, 4), "mtp.layers.0.norm.weight": torch.randn(4)}
    changed(base, **extra)
    report = merge(linear(*((base, tuned) if base_first else (tuned, base))), tmp_path / "out")
    assert all(torch.equal(load(tmp_path / "out")[name], tensor) for name, tensor in extra.items())
    assert any("mtp.fc.weight" in note for note in report.notes)


def test_whole_numbers_are_those_of_the_base(tmp_path):
    one, two = (saved(tmp_path / f"b{i}", "BertForMaskedLM", i) for i in range(2))
    name = "bert.embeddings.position_ids"
    changed(one, **{name: torch.arange(64)[None]})
    changed(two, **{name: torch.arange(64)[None] + 1})
    report = merge(linear(one, two), tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[name], torch.arange(64)[None])
    assert any("Buffers differ" in note and name in note for note in report.notes)
    changed(two, **{name: None})  # some files have it and some do not
    merge(linear(two, one), tmp_path / "other")
    assert name in load(tmp_path / "other")


def test_a_head_of_its_own_beside_a_tied_config(tmp_path):
    model = tiny("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    merge(linear(tmp_path / "m", weight=1.0), tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, model.lm_head.weight)


def test_copies_of_tied_tensors_are_left_out_and_reported(tmp_path):
    model = saved(tmp_path / "t", "T5ForConditionalGeneration")
    name = "encoder.embed_tokens.weight"
    changed(model, **{name: load(model)["shared.weight"].clone()})
    report = merge(linear(model, model), tmp_path / "out")
    assert name not in load(tmp_path / "out")
    assert any("copies of tied tensors" in note and name in note for note in report.notes)


def test_files_that_name_their_tensors_differently(tmp_path):
    one, two = (saved(tmp_path / f"b{i}", "BertForMaskedLM", i) for i in range(2))
    bare = {name.removeprefix("bert."): tensor for name, tensor in load(two).items()}
    save_file(bare, two / "model.safetensors")
    merge(linear(one, two), tmp_path / "out")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.allclose(load(tmp_path / "out")[name], (load(one)[name] + bare[name.removeprefix("bert.")]) / 2)


def test_each_stack_has_its_own_depth(tmp_path):
    one, two = (saved(tmp_path / f"g{i}", "Gemma3ForConditionalGeneration", i) for i in range(2))
    models = [{"model": str(one)}, {"model": str(two)}]
    config = {"merge_method": "slerp", "models": models, "base_model": str(one), "parameters": {"t": [0, 1]}}
    merge(config, tmp_path / "out")
    second, out = load(two), load(tmp_path / "out")
    last = [name for name in out if ".layers.1.self_attn.q_proj.w" in name and "language" in name]
    last += [name for name in out if ".layers.2.self_attn.q_proj.w" in name]
    assert len(last) == 2 and all(torch.allclose(out[name], second[name], atol=1e-5) for name in last)


def test_a_filter_that_fits_nothing_is_reported(tmp_path):
    model = write_model(tmp_path / "m", random_tensors(0))
    option = [{"filter": "mlpp", "value": 0}, {"filter": "mlp", "value": 1}, {"value": 1}]
    report = merge(linear(model, model, weight=option), tmp_path / "out")
    assert [note for note in report.notes if "filter" in note] == [
        "The filter 'mlpp' fits no tensor, so its value has no effect."
    ]


def test_models_with_equal_names_need_no_transformers(tmp_path):
    one, two = (write_model(tmp_path / f"m{i}", random_tensors(i)) for i in range(2))
    code = (
        "import sys; from hf_transfer_ext.merging import merge; "
        f"merge({linear(one, two)!r}, {str(tmp_path / 'out')!r}); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
