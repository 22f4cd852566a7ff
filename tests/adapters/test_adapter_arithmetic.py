"""Arithmetic of adapters through the merge methods: on their true changes, whatever ranks and scales they have."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_transfer_ext.merging import merge
from hf_transfer_ext.weights.lora import read_lora

KINDS = {
    "plain": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "k_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 3, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 9},
        "target_modules": ["q_proj", "down_proj", "up_proj"],
    },
}  # fmt: skip
#: Method -> options with which one model is left as it is.
METHODS = {
    "linear": {}, "task_arithmetic": {}, "ties": {"density": 1.0}, "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0}, "della": {"density": 1.0, "epsilon": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    tiny_llama().save_pretrained(folder / "base")
    for seed, (name, kind) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(**kind, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config).save_pretrained(folder / name)
    return folder


def changes(adapter):
    """module -> B A with its scale, as PEFT applies it."""
    found = read_lora(adapter)
    try:
        return {module: factors.left @ factors.right for module, factors in found.modules.items()}
    finally:
        found.checkpoint.close()


def merged(folder, out, method, weights, rank, **options):
    models = [{"model": str(folder / name), "parameters": {"weight": w}} for name, w in weights.items()]
    plan = {"merge_method": method, "base_model": str(folder / "base"), "models": models, "parameters": options}
    if method == "linear":
        del plan["base_model"]
    merge({**plan, "output": {"lora": {"rank": rank}}}, out)
    return changes(out)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for module, change in found.items():
        torch.testing.assert_close(change, expected[module], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_with_weight_1_comes_back(folder, tmp_path, method, kind):
    found = merged(folder, tmp_path / "out", method, {kind: 1.0}, KINDS[kind]["r"], **METHODS[method])
    assert_same(found, changes(folder / kind))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_what_peft_cannot_reload_is_reloaded(folder, tmp_path, method):
    """PEFT's own linear, ties and dare with a rank_pattern give an adapter that it refuses to load."""
    found = merged(folder, tmp_path / "out", method, {"patterns": 1.0}, 4, **METHODS[method])
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    after = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    for module, change in found.items():
        name = f"{module}.weight"
        torch.testing.assert_close(after[name] - before[name], change, atol=2e-6, rtol=1e-3)


def test_concatenation_is_the_exact_sum(folder, tmp_path):
    """Ranks 2, 5 and 4 add up to at most 11, so nothing is lost at rank 11."""
    weights = {"plain": 0.5, "rslora": 2.0, "patterns": -0.3}
    found = merged(folder, tmp_path / "out", "task_arithmetic", weights, 11)
    expected: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for module, change in changes(folder / name).items():
            expected[module] = expected.get(module, 0) + weight * change
    assert_same(found, expected)


def test_svd_is_the_best_approximation_of_the_sum(folder, tmp_path):
    whole = merged(folder, tmp_path / "whole", "task_arithmetic", {"plain": 1.0, "patterns": 1.0}, 6)
    cut = merged(folder, tmp_path / "cut", "task_arithmetic", {"plain": 1.0, "patterns": 1.0}, 1)
    for module, change in whole.items():
        u, s, v = torch.linalg.svd(change)
        torch.testing.assert_close(cut[module], s[0] * torch.outer(u[:, 0], v[0]), atol=1e-5, rtol=1e-3)


def test_dare_keeps_and_rescales_entries_of_the_change(folder, tmp_path):
    found = merged(folder, tmp_path / "out", "dare_linear", {"rslora": 1.0}, 32, density=0.5, rescale=True)
    for module, change in changes(folder / "rslora").items():
        kept = found[module].abs() > 1e-4 * change.abs().max()
        assert 0.3 < float(kept.float().mean()) < 0.7
        torch.testing.assert_close(found[module][kept], 2 * change[kept], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_negation_takes_the_change_away(folder, tmp_path, kind):
    found = merged(folder, tmp_path / "out", "task_arithmetic", {kind: -1.0}, 5)
    assert_same(found, {module: -change for module, change in changes(folder / kind).items()})


@pytest.mark.parametrize(
    "options, said", [({"use_dora": True}, "DoRA|use_dora"), ({"lora_bias": True}, "lora_bias|bias")]
)
def test_what_is_not_a_low_rank_change_is_refused(folder, tmp_path, options, said):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config).save_pretrained(folder / "other")
    with pytest.raises(ValueError, match=said) as refused:
        merged(folder, tmp_path / "out", "task_arithmetic", {"other": 1.0}, 2)
    assert "convert" in str(refused.value).lower() or "merge it into its base" in str(refused.value).lower()
