"""What this package writes loads in plain PEFT and transformers, and passes the checks of vLLM."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from hf_transfer_ext.adapters.convert import convert_to_lora
from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.adapters.resize import resize_lora
from hf_transfer_ext.adapters.transfer.run import transfer_lora
from hf_transfer_ext.hub.servable import servable_by
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.weights.lora import read_lora

TOKENS = torch.arange(12).reshape(2, 6)
TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = ("transferred", "extracted", "resized", "by energy", "converted")
#: What vLLM adapts in a Llama (its packed modules are split again on loading).
VLLM_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def lora(folder, name, seed, **options):
    torch.manual_seed(seed)
    config = {"r": 6, "lora_alpha": 9, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(**config, init_lora_weights=False)
    )
    model.save_pretrained(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a LoRA of PEFT's own on it, and one adapter by each way in which this package writes them."""
    folder = tmp_path_factory.mktemp("peft")
    for name in ("base", "same"):
        tiny_llama().save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    own = lora(folder, "own", 1, use_rslora=True)
    transfer_lora(own, folder / "same", folder / "transferred", method="copy", source_base=folder / "base")
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), own
    ).merge_and_unload().save_pretrained(folder / "tuned")
    extract_lora(folder / "base", folder / "tuned", folder / "extracted", rank=6)
    resize_lora(own, folder / "resized", rank=3)
    resize_lora(own, folder / "by energy", energy=0.8)  # every module gets a rank of its own
    convert_to_lora(own, folder / "converted")
    return folder


def expected(folder, kind):
    """The base with the true change of the adapter added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    found = read_lora(folder / kind)
    for module, factors in found.modules.items():
        model.get_submodule(module).weight.data += factors.left @ factors.right
    found.checkpoint.close()
    return logits(model)


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_transformers_load_it(folder, kind):
    wanted = expected(folder, kind)
    assert not torch.allclose(wanted, logits(base(folder)), atol=1e-3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(folder), folder / kind)), wanted)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder / kind)), wanted)
    torch.testing.assert_close(logits(load_model(folder / kind)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_beside_another_one(folder, kind):
    model = PeftModel.from_pretrained(base(folder), folder / "own")
    own = logits(model)
    model.load_adapter(str(folder / kind), adapter_name="ours")
    torch.testing.assert_close(logits(model), own)
    model.set_adapter("ours")
    torch.testing.assert_close(logits(model), expected(folder, kind))
    model.delete_adapter("ours")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), own)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_swapped_in(folder, kind):
    lora(folder, "first", 5)
    model = PeftModel.from_pretrained(base(folder), folder / "first")
    if kind == "by energy":  # PEFT swaps only adapters of one alpha for all modules
        with pytest.raises(ValueError, match="alpha_pattern"):
            hotswap_adapter(model, str(folder / kind), adapter_name="default")
        return
    hotswap_adapter(model, str(folder / kind), adapter_name="default")
    torch.testing.assert_close(logits(model), expected(folder, kind))


def vllm_refuses(folder, max_lora_rank=16):
    """What `PEFTHelper.validate_legal`, `parse_fine_tuned_lora_name` and `check_unexpected_modules` raise for.

    Source: vLLM, vllm/lora/peft_helper.py, vllm/lora/utils.py and vllm/lora/lora_model.py
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    found = []
    if config["r"] > max_lora_rank:
        found.append("rank")
    if config.get("bias", "none") != "none":
        found.append("bias")
    if config.get("modules_to_save"):
        found.append("modules_to_save")
    if config.get("use_dora"):
        found.append("DoRA")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        parts = name.split(".")
        if not name.startswith("base_model.model.") or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            found.append(f"name {name}")
        elif parts[-3] not in VLLM_LLAMA:
            found.append(f"module {name}")
        elif min(tensor.shape) > max_lora_rank:
            found.append(f"shape {name}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_checks_of_vllm_pass(folder, kind):
    assert vllm_refuses(folder / kind) == []
    (vllm,) = (one for one in servable_by(folder / kind) if one.name == "vllm")
    assert vllm.loads and vllm.options == ["--enable-lora"]
    # One scale for every module, as vLLM computes it from the config alone.
    config = json.loads((folder / kind / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / kind / "adapter_model.safetensors")
    found = read_lora(folder / kind)
    for module, factors in found.modules.items():
        up, down = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "BA")
        torch.testing.assert_close(scale * up @ down, factors.left @ factors.right)
    found.checkpoint.close()


@pytest.mark.parametrize(
    "options, said", [({"bias": "all"}, "bias"), ({"use_dora": True}, "DoRA"), ({"r": 20}, "rank")]
)
def test_the_two_lists_of_rules_agree(folder, options, said):
    name = lora(folder, f"refused-{said}", 3, **options)
    assert said in vllm_refuses(name)
    (vllm,) = (one for one in servable_by(name) if one.name == "vllm")
    assert not vllm.loads or vllm.options == ["--enable-lora", "--max-lora-rank 32"]


class TestSeveralAdapters:
    @pytest.fixture(scope="class")
    def several(self, folder):
        """As PEFT saves two adapters that have names of their own."""
        model = PeftModel.from_pretrained(base(folder), folder / "own", adapter_name="one")
        model.load_adapter(str(folder / "converted"), adapter_name="two")
        model.save_pretrained(folder / "several")
        return folder / "several"

    def test_they_load_from_the_root(self, folder, several):
        assert not (several / "adapter_config.json").exists()
        model = load_model(several)
        assert set(model.peft_config) == {"one", "two"} and model.active_adapters == ["one"]
        torch.testing.assert_close(logits(model), expected(folder, "own"))
        model.set_adapter("two")
        torch.testing.assert_close(logits(model), expected(folder, "converted"))

    def test_a_job_on_one_adapter_asks_which(self, several, tmp_path):
        for job in (
            lambda: resize_lora(several, tmp_path / "out", rank=2),
            lambda: convert_to_lora(several, tmp_path / "out"),
        ):
            with pytest.raises(FileNotFoundError, match="It holds several, one, two: name the folder of one"):
                job()
        resize_lora(several / "two", tmp_path / "out", rank=2)

    def test_adapters_of_different_bases(self, folder, several):
        path = several / "two" / "adapter_config.json"
        content = path.read_text()
        path.write_text(json.dumps({**json.loads(content), "base_model_name_or_path": str(folder / "same")}))
        try:
            with pytest.raises(ValueError, match="different base models"):
                load_model(several)
        finally:
            path.write_text(content)
