"""What is extracted turns the base into the fine-tune: for PEFT, for the merge engine, and by the numbers reported."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.cli import main
from hf_transfer_ext.hub.servable import servable_by
from hf_transfer_ext.merging import merge

TOKENS = torch.arange(12).reshape(2, 6)


def qwen(tied=False, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **heads, "tie_word_embeddings": tied, **changes}))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def disturb(model, *endings, scale=0.05):
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith(endings):
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def lora_pair(tmp_path):
    """A base, and the base with a LoRA of rank 3 merged into it."""
    base = save(qwen(), tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    merged = get_peft_model(qwen(), config).merge_and_unload()
    return base, save(merged, tmp_path / "tuned"), merged


def test_a_merged_lora_comes_back(tmp_path, lora_pair):
    base, tuned, merged = lora_pair
    report = extract_lora(base, tuned, tmp_path / "out", rank=3)
    assert {one.module.rpartition(".")[2] for one in report.modules} == {"q_proj", "down_proj"}
    assert report.residual_energy < 1e-10 and report.saved_modules == [] and report.saved_biases == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 and config["target_modules"] == ["down_proj", "q_proj"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(merged), atol=1e-5)
    unloaded = loaded.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(unloaded[name], tensor, atol=1e-5), name


def test_the_engine_reads_what_was_extracted(tmp_path, lora_pair):
    base, tuned, merged = lora_pair
    extract_lora(base, tuned, tmp_path / "out", rank=3)
    models = [{"model": f"{base}+{tmp_path / 'out'}", "parameters": {"weight": 1.0}}]
    merge({"merge_method": "linear", "models": models}, tmp_path / "merged")
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.allclose(tensor, merged.state_dict()[name], atol=1e-5), name


def test_the_residual_is_the_energy_of_the_singular_values_left_out(tmp_path):
    base = save(qwen(), tmp_path / "base")
    model = qwen()
    disturb(model, "o_proj.weight")
    report = extract_lora(base, save(model, tmp_path / "tuned"), tmp_path / "out", rank=5)
    for one in report.modules:
        change = model.get_submodule(one.module).weight.double() - qwen().get_submodule(one.module).weight.double()
        energy = torch.linalg.svdvals(change) ** 2
        assert one.residual_energy == pytest.approx(float(energy[5:].sum() / energy.sum()), rel=1e-4)
        assert one.change == pytest.approx(float(energy.sum().sqrt()), rel=1e-6)


def test_a_large_matrix_is_nearly_as_good_by_the_randomised_method(tmp_path):
    base = save(qwen(intermediate_size=700, hidden_size=320), tmp_path / "base")
    model = qwen(intermediate_size=700, hidden_size=320)
    disturb(model, "layers.0.mlp.up_proj.weight")
    report = extract_lora(base, save(model, tmp_path / "tuned"), tmp_path / "out", rank=8)
    change = model.model.layers[0].mlp.up_proj.weight.double() - (
        qwen(intermediate_size=700, hidden_size=320).model.layers[0].mlp.up_proj.weight.double()
    )
    energy = torch.linalg.svdvals(change) ** 2  # a flat spectrum, the worst case for a random sketch
    best = float(energy[8:].sum() / energy.sum())
    assert best <= report.modules[0].residual_energy + 1e-6 < best * 1.01


@pytest.mark.parametrize("tied", [False, True])
def test_everything_that_changed_is_carried(tmp_path, tied):
    base = save(qwen(tied), tmp_path / "base")
    model = qwen(tied)
    disturb(model, "weight", "bias")
    report = extract_lora(base, save(model, tmp_path / "tuned"), tmp_path / "out", rank=32, modules_to_save=True)
    assert {one.rank for one in report.modules} == {16, 32}  # k_proj and v_proj have 16 rows only
    assert {"model.embed_tokens", "lm_head", "model.norm"} <= set(report.saved_modules)
    assert report.saved_biases == 6
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)
    models = [{"model": f"{base}+{tmp_path / 'out'}", "parameters": {"weight": 1.0}}]
    merge({"merge_method": "linear", "models": models}, tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model), atol=2e-5)


def test_a_head_of_its_own_beside_a_tied_base_is_kept(tmp_path):
    base = save(qwen(tied=True), tmp_path / "base")
    model = qwen(tied=True)
    disturb(model, "up_proj.weight")
    tuned = save(model, tmp_path / "tuned")
    stored = load_file(tmp_path / "tuned" / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 0.1 * torch.randn(64, 32)
    save_file(stored, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    wanted = logits(AutoModelForCausalLM.from_pretrained(tuned))
    assert not torch.allclose(wanted, logits(model), atol=1e-2)  # transformers uses that head
    report = extract_lora(base, tuned, tmp_path / "out", rank=32)
    assert report.saved_modules == ["lm_head"] and not report.left_out
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.allclose(logits(loaded), wanted, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_by_default_servers_load_what_was_extracted(tmp_path, capsys, tied):
    base = save(qwen(tied), tmp_path / "base")
    model = qwen(tied)
    disturb(model, "weight", "bias")
    words = [base, save(model, tmp_path / "tuned"), str(tmp_path / "out"), "--rank", "32", "--quiet"]
    assert main(["extract", *words]) == 0
    printed = capsys.readouterr().out
    assert "vllm loads it" in printed and "llama.cpp loads it" in printed and "--modules-to-save" in printed
    assert all(server.loads for server in servable_by(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and config["bias"] == "none"
    residuals = json.loads((tmp_path / "out" / "residuals.json").read_text())
    assert not residuals["stored_whole"] and residuals["residual_energy"] < 1e-9
    changed = {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"}
    assert changed <= set(residuals["left_out"]) and ("lm_head.weight" in residuals["left_out"]) is not tied
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    norm = float((model.model.norm.weight - plain["model.norm.weight"]).norm())
    assert residuals["left_out"]["model.norm.weight"] == pytest.approx(norm, rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm: loads it. Start it with `--enable-lora`, `--max-lora-rank 32`." in card
    # The linear layers themselves are the fine-tune's.
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    merged = loaded.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        if "_proj.weight" in name:
            torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-5)
    assert main(["extract", *words, "--modules-to-save", "--overwrite"]) == 0
    assert "vllm does not load it" in capsys.readouterr().out


def test_layers_that_are_stored_transposed(tmp_path):
    base = save(gpt2(), tmp_path / "base")
    model = gpt2()
    disturb(model, "c_attn.weight", "ln_f.bias", "c_proj.bias")
    report = extract_lora(base, save(model, tmp_path / "tuned"), tmp_path / "out", rank=32, modules_to_save=True)
    assert report.residual_energy < 1e-9 and report.saved_modules == ["transformer.ln_f"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_only_some_layers(tmp_path):
    base = save(qwen(), tmp_path / "base")
    model = qwen()
    disturb(model, "layers.1.self_attn.q_proj.weight")
    extract_lora(base, save(model, tmp_path / "tuned"), tmp_path / "out", rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 1


class TestRefused:
    def test_nothing_changed(self, tmp_path):
        base = save(qwen(), tmp_path / "base")
        with pytest.raises(ValueError, match="No linear layer differs"):
            extract_lora(base, base, tmp_path / "out", rank=2)
        assert not (tmp_path / "out").exists()

    def test_other_shapes(self, tmp_path):
        base, other = save(qwen(), tmp_path / "base"), save(qwen(intermediate_size=50), tmp_path / "other")
        with pytest.raises(ValueError, match=r"down_proj.weight' has shape \[32, 48\] in .*\[32, 50\]"):
            extract_lora(base, other, tmp_path / "out", rank=2)

    def test_rank(self, tmp_path):
        with pytest.raises(ValueError, match="at least 1"):
            extract_lora(tmp_path, tmp_path, tmp_path / "out", rank=0)

    def test_existing_adapter(self, tmp_path, lora_pair):
        extract_lora(*lora_pair[:2], tmp_path / "out", rank=1)
        with pytest.raises(FileExistsError, match="--overwrite"):
            extract_lora(*lora_pair[:2], tmp_path / "out", rank=2)
        extract_lora(*lora_pair[:2], tmp_path / "out", rank=2, overwrite=True)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_the_command(tmp_path, lora_pair, capsys):
    assert main(["extract", *lora_pair[:2], str(tmp_path / "out"), "--rank", "2", "--quiet"]) == 0
    assert "energy that is lost" in capsys.readouterr().out
    assert main(["extract", *lora_pair[:2], str(tmp_path / "out"), "--rank", "2", "--quiet"]) == 2
    assert "--overwrite" in capsys.readouterr().err
