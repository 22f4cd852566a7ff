"""An adapter read as factors is the change that PEFT merges, for all scalings; other kinds are refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_transfer_ext.merging import merge
from hf_transfer_ext.weights.lora import low_rank, read_lora


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))


KINDS = {
    "plain": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj"]}),
    "patterns": (
        llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 32},
        },
    ),
    "embeddings": (llama, {"r": 2, "target_modules": ["embed_tokens", "v_proj"]}),
    "saved modules": (llama, {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "transposed": (gpt2, {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_what_peft_merges(tmp_path, kind):
    make, options = KINDS[kind]
    make().save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    models = [{"model": f"{tmp_path / 'base'}+{tmp_path / 'lora'}", "parameters": {"weight": 1.0}}]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    # A folder with an adapter alone brings its base with it.
    merge(
        {"merge_method": "linear", "models": [{"model": str(tmp_path / "lora"), "parameters": {"weight": 1.0}}]},
        tmp_path / "out2",
    )
    expected = adapted.merge_and_unload().state_dict()
    for folder in ("out", "out2"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-5), name


def test_adapters_of_different_ranks_are_merged_as_changes(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    changes = []
    for i, rank in enumerate((2, 5)):
        torch.manual_seed(i)
        config = LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False, use_rslora=bool(i))
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        adapted.save_pretrained(tmp_path / f"lora{i}")
        layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
        changes.append(layer.get_delta_weight("default").detach())
    base = tmp_path / "base"
    models = [
        {"model": f"{base}+{tmp_path / f'lora{i}'}", "parameters": {"weight": w}} for i, w in enumerate((0.3, 0.6))
    ]
    merge({"merge_method": "task_arithmetic", "base_model": str(base), "models": models}, tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()[name]
    assert torch.allclose(found, llama().state_dict()[name] + 0.3 * changes[0] + 0.6 * changes[1], atol=1e-5)


class TestRefused:
    def lora(self, folder, model=None, **changes):
        options = {"r": 2, "target_modules": ["q_proj"], **changes}
        get_peft_model(model or llama(), LoraConfig(**options)).save_pretrained(folder)
        return folder

    def test_dora(self, tmp_path):
        with pytest.raises(ValueError, match="use_dora"):
            read_lora(self.lora(tmp_path, use_dora=True))

    def test_lora_with_a_bias(self, tmp_path):
        with pytest.raises(ValueError, match="lora_bias"):
            read_lora(self.lora(tmp_path, lora_bias=True))

    def test_another_kind(self, tmp_path):
        config = json.loads((self.lora(tmp_path) / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
        with pytest.raises(ValueError, match="of type IA3"):
            read_lora(tmp_path)

    def test_no_adapter(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not a PEFT adapter"):
            read_lora(tmp_path)

    def test_another_base(self, tmp_path):
        gpt2().save_pretrained(tmp_path / "base")
        model = f"{tmp_path / 'base'}+{self.lora(tmp_path / 'lora')}"
        config = {"merge_method": "linear", "models": [{"model": model, "parameters": {"weight": 1}}]}
        with pytest.raises(ValueError, match="does not fit model"):
            merge(config, tmp_path / "out")


class TestLowRank:
    def test_exact_where_the_rank_is_enough(self):
        torch.manual_seed(0)
        for shape in ((40, 30), (400, 700)):
            matrix = torch.randn(shape[0], 5) @ torch.randn(5, shape[1])
            factors = low_rank(matrix, 5)
            assert factors.shape == shape
            assert torch.allclose(factors.rows(0, shape[0]), matrix, atol=1e-3)

    @pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("rank", [4, 40])
    def test_close_to_the_best_for_flat_and_steep_spectra(self, power, rank):
        torch.manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(size, 400)).Q for size in (400, 500))
        values = torch.arange(1, 401).float() ** -power
        factors = low_rank((left * values) @ right.T, rank)
        lost = float((((left * values) @ right.T).double() - (factors.left @ factors.right).double()).square().sum())
        best, whole = float(values[rank:].double().square().sum()), float(values.double().square().sum())
        assert best - 1e-9 * whole <= lost <= best + 1e-2 * whole * (0.2 if power else 1)

    def test_more_rank_than_the_matrix_has(self):
        torch.manual_seed(0)
        matrix = torch.randn(400, 4) @ torch.randn(4, 700)
        for rank in (30, 70, 120):
            factors = low_rank(matrix, rank)
            assert float((factors.rows(0, 400) - matrix).norm() / matrix.norm()) < 1e-5

    def test_by_hand(self):
        factors = low_rank(torch.diag(torch.tensor([4.0, 1.0])), 1)
        assert torch.allclose(factors.rows(0, 2), torch.diag(torch.tensor([4.0, 0.0])), atol=1e-6)
        assert float(factors.left.norm()) == pytest.approx(2.0) and float(factors.right.norm()) == pytest.approx(2.0)

    @pytest.mark.parametrize("rank", [0, 3])
    def test_ranks_that_there_are_not(self, rank):
        with pytest.raises(ValueError, match="ranks from 1 to 2"):
            low_rank(torch.eye(2), rank)
