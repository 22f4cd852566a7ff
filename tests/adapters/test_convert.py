"""A converted adapter is plain, and its model is that of the adapter it came from, up to the reported residual."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from hf_transfer_ext.adapters.convert import convert_to_lora, dora_change
from hf_transfer_ext.weights.lora import LoraFactors, read_lora

TOKENS = torch.arange(12).reshape(2, 6)
TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))


def saved(tmp_path, make, config):
    """A base folder and an adapter folder, and the adapter's model."""
    make().save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    model = get_peft_model(make(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # magnitudes are positive norms; everything else may be anything
            noise = 0.1 * torch.randn_like(parameter)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else parameter.data + noise
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def loaded(tmp_path, make):
    config = read_lora(tmp_path / "plain").config
    assert config["peft_type"] == "LORA" and not config.get("use_dora") and not config.get("lora_bias")
    assert not config.get("use_rslora") and config["lora_alpha"] == config["r"]
    return PeftModel.from_pretrained(make(), tmp_path / "plain")


def test_rslora_is_exact(tmp_path):
    model = saved(tmp_path, tiny_llama, LoraConfig(r=4, lora_alpha=6, use_rslora=True, **TARGETS))
    report = convert_to_lora(tmp_path / "adapter", tmp_path / "plain")
    assert report.residual_energy == 0.0 and report.rank == 4
    torch.testing.assert_close(logits(loaded(tmp_path, tiny_llama)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make, transposed", [(tiny_llama, False), (gpt2, True)])
def test_dora_at_full_rank_is_exact_and_below_it_reports_what_is_lost(tmp_path, make, transposed):
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if transposed else TARGETS
    model = saved(tmp_path, make, LoraConfig(r=4, use_dora=True, **{"task_type": "CAUSAL_LM", **targets}))
    report = convert_to_lora(tmp_path / "adapter", tmp_path / "plain", base=tmp_path / "base", rank=64)
    assert report.residual_energy < 1e-9
    torch.testing.assert_close(logits(loaded(tmp_path, make)), logits(model), rtol=1e-4, atol=1e-4)
    cut = convert_to_lora(tmp_path / "adapter", tmp_path / "cut", base=tmp_path / "base", rank=5)
    assert 0.001 < cut.residual_energy < 1
    told = json.loads((tmp_path / "cut" / "residuals.json").read_text())
    assert told["residual_energy"] == cut.residual_energy


def test_dora_by_hand():
    """W = (3, 4), s B A = (3, 4): the sum (6, 8) has norm 10, and a magnitude of 5 gives W back: no change."""
    weight, factors = torch.tensor([[3.0, 4.0]]), LoraFactors(torch.tensor([[1.0]]), torch.tensor([[3.0, 4.0]]))
    assert dora_change(weight, factors, torch.tensor([5.0])).tolist() == [[0.0, 0.0]]
    assert dora_change(weight, factors, torch.tensor([10.0])).tolist() == [[3.0, 4.0]]


def test_biases_go_into_the_base_layers_own(tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["c_attn"], task_type="CAUSAL_LM")
    config.fan_in_fan_out = True
    model = saved(tmp_path, gpt2, config)
    report = convert_to_lora(tmp_path / "adapter", tmp_path / "plain", base=tmp_path / "base")
    assert report.saved_biases == 2 and report.residual_energy == 0.0
    torch.testing.assert_close(logits(loaded(tmp_path, gpt2)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.lora_bias")
def test_a_bias_without_a_place_is_refused(tmp_path):
    saved(tmp_path, tiny_llama, LoraConfig(r=4, lora_bias=True, **TARGETS))
    with pytest.raises(ValueError, match="the base's layer has none to add it to"):
        convert_to_lora(tmp_path / "adapter", tmp_path / "plain", base=tmp_path / "base")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_other_changes_of_weights_come_through_peft(tmp_path, config):
    model = saved(tmp_path, tiny_llama, config(r=4, **TARGETS))
    report = convert_to_lora(tmp_path / "adapter", tmp_path / "plain", base=tmp_path / "base", rank=32)
    assert report.residual_energy < 1e-6 and {one.rank for one in report.modules} == {32}
    torch.testing.assert_close(logits(loaded(tmp_path, tiny_llama)), logits(model), rtol=1e-3, atol=1e-3)


def test_what_is_not_a_change_of_weights_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="cannot be written as a LoRA"):
        convert_to_lora(tmp_path / "adapter", tmp_path / "plain", base=tmp_path / "base", rank=2)
    saved(tmp_path / "ia3", tiny_llama, IA3Config(feedforward_modules=["down_proj"], **TARGETS))
    with pytest.raises(ValueError, match="cannot be written as a LoRA"):
        convert_to_lora(tmp_path / "ia3" / "adapter", tmp_path / "plain", base=tmp_path / "base", rank=2)


def test_a_rank_is_asked_for_where_the_change_is_cut(tmp_path):
    saved(tmp_path, tiny_llama, LoraConfig(r=4, use_dora=True, **TARGETS))
    with pytest.raises(ValueError, match="give `rank`"):
        convert_to_lora(tmp_path / "adapter", tmp_path / "plain", base=tmp_path / "base")
    with pytest.raises(ValueError, match="`rank` must be at least 1"):
        convert_to_lora(tmp_path / "adapter", tmp_path / "plain", rank=0)
    with pytest.raises(FileNotFoundError, match="not a PEFT adapter"):
        convert_to_lora(tmp_path / "base", tmp_path / "plain")
