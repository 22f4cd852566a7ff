"""Results that cannot be right are refused: NaN and infinity anywhere, and numbers that need scales of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from merging.tiny_models import family, load, random_tensors, write_model
from safetensors.torch import save_file

from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.cli import main
from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.moe.plan import parse_moe_config
from hf_transfer_ext.merging.planning.config import parse_config

NAME = "model.layers.0.self_attn.q_proj.weight"


def linear(*models, weight=0.5, **keys):
    entries = [{"model": str(model), "parameters": {"weight": weight}} for model in models]
    return {"merge_method": "linear", "models": entries, **keys}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
@pytest.mark.parametrize("form", ["value", "gradient", "condition"])
def test_settings_are_finite(value, form):
    setting = {"value": value, "gradient": [0.5, value], "condition": [{"filter": "mlp", "value": value}]}[form]
    config = linear("a", "b")
    config["models"][1]["parameters"]["weight"] = setting
    with pytest.raises(ValueError, match=r"models\[1\]\.parameters\.weight.*has to be a finite number"):
        parse_config(config)


@pytest.mark.parametrize("key", ["noise_scale", "residual_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400])
def test_settings_of_a_mixture_are_finite(key, value):
    experts = [{"source_model": "a", key: value}, {"source_model": "b"}]
    with pytest.raises(ValueError, match=rf"experts\[0\]\.{key}.*has to be a finite number"):
        parse_moe_config({"base_model": "a", "gate_mode": "random", "experts": experts})


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0"])
def test_a_size_on_the_command_line_is_a_number(tmp_path, capsys, value):
    base, _ = family(tmp_path, 1)
    (tmp_path / "c.yml").write_text(json.dumps(linear(base, base)))
    assert main(["merge", str(tmp_path / "c.yml"), str(tmp_path / "out"), "--max-shard-gb", value]) == 2
    assert "max-shard-gb" in capsys.readouterr().err and not (tmp_path / "out").exists()


def models_of(tmp_path, dtype, value):
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(0).items()}
    tensors[NAME] = torch.full_like(tensors[NAME], value)
    return write_model(tmp_path / "a", tensors), write_model(tmp_path / "b", tensors)


@pytest.mark.parametrize(
    ("dtype", "value", "weight", "out_dtype"),
    [
        (torch.float32, 3e38, 1.0, None),
        (torch.bfloat16, 3e38, 1.0, None),
        (torch.float16, 6e4, 1.0, None),
        (torch.float32, 1e5, 0.5, "float16"),
        (torch.float32, 1e30, 1e9, "bfloat16"),
    ],
)
def test_a_result_that_overflows_is_named(tmp_path, caplog, dtype, value, weight, out_dtype):
    config = linear(*models_of(tmp_path, dtype, value), weight=weight, parameters={"normalize": False})
    if out_dtype:
        config["out_dtype"] = out_dtype
    with pytest.raises(ValueError, match=rf"{NAME}' of the result is inf at element 0.*does not fit"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(config, tmp_path / "out", allow_nonfinite=True)
    assert f"Tensor '{NAME}' of the result is inf at element 0" in caplog.text
    assert torch.isinf(load(tmp_path / "out")[NAME]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_copy_of_what_is_not_finite_is_named(tmp_path, caplog, value):
    model, _ = models_of(tmp_path, torch.bfloat16, value)
    config = {"merge_method": "passthrough", "models": [{"model": model}]}
    with pytest.raises(ValueError, match=rf"{NAME}.*The input contains it"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(config, tmp_path / "out", allow_nonfinite=True)
    assert NAME in caplog.text


def test_large_numbers_whose_sum_overflows_are_finite(tmp_path):
    model, _ = models_of(tmp_path, torch.float16, 6e4)
    merge(linear(model, model), tmp_path / "out")
    assert (load(tmp_path / "out")[NAME] == torch.tensor(6e4).half()).all()


def test_an_adapter_that_overflows_its_dtype_is_refused(tmp_path):
    base = random_tensors(0)
    tuned = {**base, NAME: base[NAME] + 1e12}
    folders = write_model(tmp_path / "a", base), write_model(tmp_path / "b", tuned)
    with pytest.raises(ValueError, match="would hold NaN or infinity"):
        extract_lora(*folders, tmp_path / "out", rank=1, dtype="float16")
    assert not (tmp_path / "out").exists()


class TestQuantized:
    @pytest.fixture
    def fp8(self, tmp_path):
        """A model with eight-bit floats, whose scales are tensors of their own."""
        tensors = random_tensors(0)
        for name in [name for name in tensors if "proj.weight" in name]:
            tensors[name] = (tensors[name] * 10).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.tensor([[0.1]])
        return write_model(tmp_path / "fp8", tensors, quantization_config={"quant_method": "fp8"})

    def adapter(self, folder):
        folder.mkdir()
        prefix = f"base_model.model.{NAME.removesuffix('.weight')}"
        factors = {f"{prefix}.lora_A.weight": torch.ones(2, 16), f"{prefix}.lora_B.weight": torch.ones(16, 2)}
        save_file(factors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        return folder

    def test_an_adapter_on_it_is_refused(self, tmp_path, fp8):
        config = {"merge_method": "passthrough", "models": [{"model": f"{fp8}+{self.adapter(tmp_path / 'ad')}"}]}
        with pytest.raises(ValueError, match=rf"{NAME}.*stores quantized.*float8_e4m3fn"):
            merge(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_scales_beside_numbers_of_a_wide_dtype_count_too(self, tmp_path, fp8):
        tensors = {name: tensor.float() for name, tensor in load(Path(fp8)).items()}
        model = write_model(tmp_path / "wide", tensors)
        config = {"merge_method": "passthrough", "models": [{"model": f"{model}+{self.adapter(tmp_path / 'ad')}"}]}
        with pytest.raises(ValueError, match="with scales of its own"):
            merge(config, tmp_path / "out")

    def test_it_is_copied_with_its_scales(self, tmp_path, fp8):
        merge({"merge_method": "passthrough", "models": [{"model": fp8}]}, tmp_path / "out")
        before, after = load(Path(fp8)), load(tmp_path / "out")
        assert set(after) == set(before)
        assert all(torch.equal(after[name].float(), before[name].float()) for name in before)

    @pytest.mark.parametrize("order", ["fp8 first", "fp8 last", "alone", "scaled"])
    def test_it_is_not_calculated_with(self, tmp_path, fp8, order):
        tensors = random_tensors(1)
        scales = {f"{name}_scale_inv": torch.tensor([[0.1]]) for name in tensors if "proj.weight" in name}
        plain = write_model(tmp_path / "plain", {**tensors, **scales})
        configs = {
            "fp8 first": linear(fp8, plain),
            "fp8 last": linear(plain, fp8),
            "alone": linear(fp8, parameters={"normalize": False}),
            "scaled": {"merge_method": "passthrough", "models": [{"model": fp8, "parameters": {"scale": 2.0}}]},
        }
        with pytest.raises(ValueError, match=r"float8_e4m3fn.*not quantized"):
            merge(configs[order], tmp_path / "out")
        assert not (tmp_path / "out").exists()
