"""Which adapters the servers load, by their rules."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_transfer_ext.adapters.convert import convert_to_lora
from hf_transfer_ext.hub.servable import servable_by


def adapter(folder, **options):
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    config["init_lora_weights"] = False
    get_peft_model(tiny_llama(), LoraConfig(**{**config, **options})).save_pretrained(folder)
    return folder


def servers(folder):
    return {one.name: one for one in servable_by(folder)}


def test_a_plain_lora_of_linear_layers_is_loaded_everywhere(tmp_path):
    found = servers(adapter(tmp_path / "lora"))
    assert list(found) == ["peft", "vllm", "llama.cpp"]
    assert all(one.loads for one in found.values()) and not found["peft"].reasons + found["vllm"].reasons
    assert "convert ADAPTER OUT --to gguf" in found["llama.cpp"].sentence()
    assert found["vllm"].options == ["--enable-lora"]
    assert servers(adapter(tmp_path / "wide", r=20, lora_alpha=20))["vllm"].options[1] == "--max-lora-rank 32"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules (lm_head)"),
    ],
)
def test_what_servers_refuse(tmp_path, options, said):
    found = servers(adapter(tmp_path / "lora", **options))
    assert found["peft"].loads
    for name in ("vllm", "llama.cpp"):
        assert not found[name].loads and not found[name].options and said in " ".join(found[name].reasons)


def test_ranks(tmp_path):
    found = servers(adapter(tmp_path / "lora", r=600, lora_alpha=600))
    assert not found["vllm"].loads and "rank is 600" in found["vllm"].reasons[0] and found["llama.cpp"].loads
    found = servers(adapter(tmp_path / "one", rank_pattern={"q_proj": 600}, alpha_pattern={"q_proj": 600}))
    assert "rank is 600" in found["vllm"].reasons[0]


def test_scales_that_vllm_would_get_wrong(tmp_path):
    folder = adapter(tmp_path / "lora", alpha_pattern={"q_proj": 12})
    found = servers(folder)
    assert "by 1 instead of 3" in found["vllm"].reasons[0] and found["llama.cpp"].loads
    assert "instead of" in servers(adapter(tmp_path / "ranks", rank_pattern={"q_proj": 2}))["vllm"].reasons[0]
    convert_to_lora(folder, tmp_path / "plain")
    assert servers(tmp_path / "plain")["vllm"].loads


def test_embeddings_and_the_head(tmp_path):
    found = servers(adapter(tmp_path / "tokens", target_modules=["q_proj", "embed_tokens"]))
    assert "embed_tokens" in found["vllm"].reasons[0] and "matrix products" in found["llama.cpp"].reasons[0]
    found = servers(adapter(tmp_path / "head", target_modules=["q_proj", "lm_head"]))
    assert "lm_head" in found["vllm"].reasons[0] and found["llama.cpp"].loads


def test_another_type_and_no_weights(tmp_path):
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "ia3")
    found = servers(tmp_path / "ia3")
    assert found["peft"].loads and "type IA3" in found["vllm"].reasons[0] and not found["llama.cpp"].loads
    folder = adapter(tmp_path / "lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert not any(one.loads for one in servable_by(folder))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        servable_by(tmp_path)
