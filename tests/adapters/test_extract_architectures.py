"""An adapter of full rank, loaded by PEFT, calculates what the fine-tune does; so does the merge engine's result."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES, tiny

from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.merging import merge

NAMES = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "MambaForCausalLM",
    "Qwen3_5ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "BertForSequenceClassification",
    "RobertaForTokenClassification",
    "BertForMaskedLM",
    "BertModel",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "ViTForImageClassification",
]


def inputs_of(model):
    known = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 80, (2, 7), generator=generator)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 64, generator=generator), "decoder_input_ids": ids}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if "decoder_input_ids" in known else {})


def outputs(model):
    with torch.no_grad():
        found = model(**inputs_of(getattr(model, "base_model", model)))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_is_the_fine_tune(tmp_path, name):
    base, tuned = tiny(name, 0), tiny(name, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=256, modules_to_save=True)
    assert report.residual_energy < 1e-9 and not report.left_out
    kind = getattr(transformers, name)
    loaded = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    wanted, before = outputs(tuned), outputs(base)
    change = (wanted - before).abs().max()
    with torch.no_grad():
        found = loaded(**inputs_of(tuned))
    found = found.logits if hasattr(found, "logits") else found.last_hidden_state
    assert (found - wanted).abs().max() < 1e-3 * change + 1e-5
    merge(
        {"merge_method": "passthrough", "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'lora'}"}]},
        tmp_path / "merged",
    )
    assert (outputs(kind.from_pretrained(tmp_path / "merged").eval()) - wanted).abs().max() < 1e-3 * change + 1e-5


@pytest.mark.parametrize("name, whole", [("LlamaForCausalLM", False), ("T5ForConditionalGeneration", True)])
def test_only_for_models_that_servers_adapt_something_is_left_out(tmp_path, name, whole):
    base, tuned = tiny(name, 0), tiny(name, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=64)
    assert bool(report.saved_modules or report.saved_parameters) is whole and bool(report.left_out) is not whole


def test_what_the_user_leaves_out_is_reported(tmp_path):
    base, tuned = tiny("LlamaForCausalLM", 0), tiny("LlamaForCausalLM", 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_lora(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=4, include=["self_attn"], exclude=["k_proj"]
    )
    assert {one.module.rpartition(".")[2] for one in report.modules} == {"q_proj", "v_proj", "o_proj"}
    name = "model.layers.0.self_attn.k_proj.weight"
    change = tuned.state_dict()[name].detach() - base.state_dict()[name].detach()
    assert report.left_out[name] == pytest.approx(float(change.norm()), rel=1e-5)
    assert "model.embed_tokens.weight" in report.left_out and not report.saved_modules
    assert not any(
        "k_proj" in key or "embed" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors")
    )


def test_added_tokens_are_stored_and_reported(tmp_path):
    base = tiny("LlamaForCausalLM", 0)
    base.save_pretrained(tmp_path / "base")
    tuned = tiny("LlamaForCausalLM", 1)
    tuned.resize_token_embeddings(100, mean_resizing=False)
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=64, modules_to_save=True)
    assert any("resize_token_embeddings(100)" in note for note in report.notes)
    resized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(100, mean_resizing=False)
    loaded = PeftModel.from_pretrained(resized, tmp_path / "lora").eval()
    assert torch.allclose(outputs(loaded), outputs(tuned), atol=1e-4)


def test_names_are_architectures():
    assert set(NAMES) <= set(ARCHITECTURES)
