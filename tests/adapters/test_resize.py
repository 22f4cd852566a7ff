"""A resized adapter is the truncated SVD of the dense change, and loads in PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from hf_transfer_ext.adapters.resize import kept_rank, resize_lora
from hf_transfer_ext.weights.lora import read_lora

TOKENS = torch.arange(12).reshape(2, 6)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))


KINDS = {
    "plain": (tiny_llama, {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": (tiny_llama, {"r": 6, "use_rslora": True, "target_modules": ["q_proj"]}),
    "patterns": (
        tiny_llama,
        {
            "r": 6,
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"k_proj": 3},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 32},
        },
    ),
    "embeddings": (tiny_llama, {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "saved modules": (tiny_llama, {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "transposed": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


def adapter(make, options, folder):
    torch.manual_seed(3)
    model = get_peft_model(make(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_approximation_of_the_dense_change(tmp_path, kind):
    make, options = KINDS[kind]
    adapter(make, options, tmp_path / "lora")
    report = resize_lora(tmp_path / "lora", tmp_path / "small", rank=2)
    before, after = read_lora(tmp_path / "lora"), read_lora(tmp_path / "small")
    for one in report.modules:
        dense = (before.modules[one.module].left @ before.modules[one.module].right).double()
        u, s, v = torch.linalg.svd(dense)
        best = u[:, : one.rank] * s[: one.rank] @ v[: one.rank]
        new = after.modules[one.module].left @ after.modules[one.module].right
        torch.testing.assert_close(new.double(), best, rtol=1e-4, atol=1e-5)
        assert one.rank == 2 and one.change == pytest.approx(float(s.norm()), rel=1e-5)
        assert one.residual_energy == pytest.approx(float((s[2:].norm() / s.norm()) ** 2), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_own_rank_keeps_the_model(tmp_path, kind):
    make, options = KINDS[kind]
    model = adapter(make, options, tmp_path / "lora")
    report = resize_lora(tmp_path / "lora", tmp_path / "same", rank=64)
    assert report.residual_energy < 1e-10
    loaded = PeftModel.from_pretrained(make(), tmp_path / "same").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert after_is_plain(tmp_path / "same")


def after_is_plain(folder):
    config = read_lora(folder).config
    return config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]


def test_each_criterion_by_hand():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # squares 16, 4, 1, 1 of 22
    assert [kept_rank(values, energy=e) for e in (0.1, 16 / 22, 0.8, 20 / 22, 0.92, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert [kept_rank(values, ratio=r) for r in (1.5, 2.0, 3.9, 4.0)] == [1, 2, 2, 4]
    assert [kept_rank(values, rank=r) for r in (1, 3, 9)] == [1, 3, 4]
    assert kept_rank(values, rank=3, energy=0.8, ratio=4.0) == 2
    assert kept_rank(torch.zeros(3, dtype=torch.float64), energy=0.9) == 3


def test_energy_gives_every_module_its_own_rank(tmp_path):
    adapter(*KINDS["plain"], tmp_path / "lora")
    report = resize_lora(tmp_path / "lora", tmp_path / "out", energy=0.7)
    ranks = {one.module: one.rank for one in report.modules}
    assert len(set(ranks.values())) > 1 and all(one.residual_energy <= 0.3 + 1e-6 for one in report.modules)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    for module, rank in ranks.items():
        assert loaded.base_model.model.get_submodule(module).lora_A["default"].weight.shape[0] == rank


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs a criterion"),
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"energy": 0.0}, "`energy` must be in"),
        ({"energy": 1.1}, "`energy` must be in"),
        ({"ratio": 1.0}, "`ratio` must be greater"),
    ],
)
def test_bad_criteria_are_refused_before_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        resize_lora(tmp_path / "nothing", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_existing_adapter_stays_unless_it_may_be_replaced(tmp_path):
    adapter(*KINDS["plain"], tmp_path / "lora")
    resize_lora(tmp_path / "lora", tmp_path / "out", rank=2)
    with pytest.raises(FileExistsError, match="overwrite"):
        resize_lora(tmp_path / "lora", tmp_path / "out", rank=1)
    assert resize_lora(tmp_path / "lora", tmp_path / "out", rank=1, overwrite=True).rank == 1
