"""A merge as an adapter is the change of the whole merge, cut to its best approximation of a rank."""

from __future__ import annotations

import json

import pytest
import torch
from merging.tiny_models import interrupted_at_read, load, result_bytes
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_transfer_ext.adapters import extract
from hf_transfer_ext.cli import main
from hf_transfer_ext.merging import merge
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.lora import LoraFactors, low_rank, truncated

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base, three LoRAs of different rank and scale on it, and a full fine-tune."""
    folder = tmp_path_factory.mktemp("inputs")
    names = {name: str(folder / name) for name in ("base", "lora0", "lora1", "lora2", "full")}
    llama().save_pretrained(names["base"])
    kinds = [
        {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
        {"r": 5, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "k_proj"]},
        {"r": 4, "rank_pattern": {"down_proj": 3}, "target_modules": ["q_proj", "down_proj", "up_proj"]},
    ]
    for i, kind in enumerate(kinds):
        torch.manual_seed(i + 1)
        model = AutoModelForCausalLM.from_pretrained(names["base"])
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **kind)
        get_peft_model(model, config).save_pretrained(names[f"lora{i}"])
    full = llama()
    generator = torch.Generator().manual_seed(9)
    for name, parameter in full.named_parameters():
        if "layers" in name and parameter.dim() == 2:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    full.save_pretrained(names["full"])
    return names


def config_of(inputs, method, models, *, weights=(0.5, 0.8, -0.3), base=True, **more):
    listed = [{"model": inputs[m], "parameters": {"weight": w}} for m, w in zip(models, weights, strict=False)]
    return {"merge_method": method, "models": listed, **({"base_model": inputs["base"]} if base else {}), **more}


def changes(inputs, config, folder):
    """Of the whole merged model from the base, in float64."""
    merge(config, folder)
    before = load(inputs["base"])
    return {name: tensor.double() - before[name].double() for name, tensor in load(folder).items()}


def stored(folder):
    """B A of every module of an adapter folder (alpha = r), in float64."""
    tensors = {name.removeprefix("base_model.model."): one.double() for name, one in load(folder).items()}
    downs = [name for name in tensors if name.endswith("lora_A.weight")]
    return {
        name.removesuffix(".lora_A.weight"): tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        for name in downs
    }


CASES = {
    "mixed ranks": ("task_arithmetic", ["lora0", "lora1", "lora2"], {"parameters": {"lambda": 0.7}}),
    "normalized": ("task_arithmetic", ["lora0", "lora1", "lora2"], {"parameters": {"normalize": True}}),
    "mean": ("linear", ["lora0", "lora1"], {}),
    "with a full model": ("task_arithmetic", ["lora0", "full", "lora2"], {}),
    "trimmed": ("ties", ["lora0", "lora1", "full"], {"parameters": {"density": 0.4}, "weights": (0.5, 0.5, 0.3)}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [1, 4, 32])
def test_best_approximation_of_the_whole_change(tmp_path, inputs, case, rank):
    method, models, more = CASES[case]
    config = config_of(inputs, method, models, **more)
    oracle = changes(inputs, config, tmp_path / "whole")
    report = merge({**config, "output": {"lora": {"rank": rank}}}, tmp_path / "out").adapter
    written = json.loads((tmp_path / "out" / "residuals.json").read_text())
    found = stored(tmp_path / "out")
    assert {f"{module}.weight" for module in found} == {name for name, one in oracle.items() if one.abs().max() > 1e-7}
    lost = total = 0.0
    for module, product in found.items():
        change = oracle[f"{module}.weight"]
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        assert torch.allclose(product, u[:, :rank] * s[:rank] @ v[:rank], atol=2e-6), module
        energy = float((s[rank:] ** 2).sum() / (s**2).sum())
        assert written["modules"][module]["residual_energy"] == pytest.approx(energy, rel=1e-3, abs=1e-9)
        assert written["modules"][module]["change"] == pytest.approx(float(s.norm()), rel=1e-4)
        lost, total = lost + float((s[rank:] ** 2).sum()), total + float((s**2).sum())
    assert report.residual_energy == written["residual_energy"] == pytest.approx(lost / total, rel=1e-3, abs=1e-9)


def test_peft_loads_it(tmp_path, inputs):
    config = config_of(inputs, "task_arithmetic", ["lora0", "lora1", "lora2"])
    oracle = changes(inputs, config, tmp_path / "whole")
    merge(config, tmp_path / "out", lora_rank=16)
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == inputs["base"] and adapter["r"] == 16
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs["base"]), tmp_path / "out")
    before = load(inputs["base"])
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert torch.allclose(tensor.double(), before[name].double() + oracle[name], atol=2e-6), name
    again = {"merge_method": "linear", "models": [{"model": str(tmp_path / "out"), "parameters": {"weight": 1.0}}]}
    merge(again, tmp_path / "again")
    whole = load(tmp_path / "whole")
    assert all(torch.allclose(one, whole[name], atol=2e-6) for name, one in load(tmp_path / "again").items())


def test_factors_are_not_averaged_one_by_one(tmp_path, inputs):
    """mean(B) mean(A) is not the mean of B A: the cross terms would be a third of the change here."""
    config = config_of(inputs, "linear", ["lora1", "lora1"], weights=(1.0, 1.0))
    merge(config, tmp_path / "out", lora_rank=5)
    assert merge(config, tmp_path / "out", lora_rank=5, overwrite=True).adapter.residual_energy < 1e-12
    tensors = load(inputs["lora1"])
    for module, product in stored(tmp_path / "out").items():
        up, down = (tensors[f"base_model.model.{module}.lora_{kind}.weight"].double() for kind in "BA")
        assert torch.allclose(product, up @ down * 5 / 5**0.5, atol=1e-6), module


def test_without_a_base_model_the_adapters_common_one_is_taken(tmp_path, inputs):
    config = config_of(inputs, "linear", ["lora0", "lora2"], base=False)
    merge(config, tmp_path / "out", lora_rank=4)
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == inputs["base"]


def test_adapters_alone_read_no_matrix_of_the_base(tmp_path, inputs, monkeypatch):
    read = []
    original = Checkpoint.read_bytes

    def spy(self, entry, start, view):
        read.append(entry.name)
        original(self, entry, start, view)

    monkeypatch.setattr(Checkpoint, "read_bytes", spy)
    merge(config_of(inputs, "task_arithmetic", ["lora0", "lora1"]), tmp_path / "out", lora_rank=4)
    assert not [name for name in read if name.endswith(("q_proj.weight", "down_proj.weight")) and "lora" not in name]


def test_an_interrupted_one_goes_on(tmp_path, inputs, monkeypatch):
    config = config_of(inputs, "ties", ["full", "lora0"])
    merge(config, tmp_path / "whole", lora_rank=3)
    with interrupted_at_read(60), pytest.raises(KeyboardInterrupt):
        merge(config, tmp_path / "out", lora_rank=3)
    (partial,) = tmp_path.glob(".out.partial-merge-*")
    finished = len(list((partial / ".factors").glob("*.safetensors")))
    assert finished > 3 and not (tmp_path / "out").exists()
    found = []
    monkeypatch.setattr(extract, "low_rank", lambda change, rank: found.append(rank) or low_rank(change, rank))
    merge(config, tmp_path / "out", lora_rank=3)
    assert len(found) == len(stored(tmp_path / "out")) - finished
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "whole")


def test_truncation_of_a_product():
    generator = torch.Generator().manual_seed(0)
    factors = LoraFactors(torch.randn(40, 9, generator=generator), torch.randn(9, 30, generator=generator))
    u, s, v = torch.linalg.svd(factors.left.double() @ factors.right.double(), full_matrices=False)
    for rank in (1, 4, 9, 20):
        new, norm, lost = truncated(factors, rank)
        assert new.left.shape[1] == min(rank, 9)
        product = new.left.double() @ new.right.double()
        assert torch.allclose(product, u[:, :rank] * s[:rank] @ v[:rank], atol=1e-5)
        assert norm == pytest.approx(float(s.norm())) and lost == pytest.approx(float(s[rank:].norm()), abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_sum_of_models_scales_what_no_model_changed_too(tmp_path, inputs, normalize):
    """Weights that do not sum to 1 make another tensor of equal ones, so that it is not the base's own."""
    config = config_of(inputs, "linear", ["lora0", "lora0"], weights=(0.5, 0.8), parameters={"normalize": normalize})
    oracle = changes(inputs, config, tmp_path / "whole")
    merge({**config, "output": {"lora": {"rank": 32}}}, tmp_path / "out")
    found = stored(tmp_path / "out")
    assert ("model.layers.0.mlp.up_proj" in found) == (not normalize)  # which the adapter does not change
    for module, product in found.items():
        assert torch.allclose(product, oracle[f"{module}.weight"], atol=2e-6), module


class TestRefused:
    def refused(self, tmp_path, config, message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            merge(config, tmp_path / "out", **options)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    @pytest.mark.parametrize("rank", [0, -1, "8", True, None])
    def test_rank(self, tmp_path, inputs, rank):
        config = config_of(inputs, "linear", ["lora0"], output={"lora": {"rank": rank}})
        self.refused(tmp_path, config, r"output\.lora\.rank")

    def test_key(self, tmp_path, inputs):
        config = config_of(inputs, "linear", ["lora0"], output={"lora": {"rnk": 2}})
        self.refused(tmp_path, config, "Did you mean 'rank'")

    def test_argument(self, tmp_path, inputs):
        self.refused(tmp_path, config_of(inputs, "linear", ["lora0"]), "`lora_rank` must be at least 1", lora_rank=0)

    def test_no_base(self, tmp_path, inputs):
        config = config_of(inputs, "linear", ["lora0", "full"], base=False)
        self.refused(tmp_path, config, "needs a base model for the adapter", lora_rank=2)

    def test_base_that_is_an_adapter(self, tmp_path, inputs):
        config = {**config_of(inputs, "linear", ["lora0", "full"]), "base_model": inputs["lora1"]}
        self.refused(tmp_path, config, "not an adapter itself", lora_rank=2)

    def test_vocabulary(self, tmp_path, inputs):
        config = config_of(inputs, "linear", ["lora0"], tokenizer_source="base")
        self.refused(tmp_path, config, "has no tokenizer|give up `tokenizer`", lora_rank=2)

    def test_nothing_changed(self, tmp_path, inputs):
        config = config_of(inputs, "task_arithmetic", ["lora0"], weights=(0.0,))
        self.refused(tmp_path, config, "No linear layer differs", lora_rank=2)

    def test_layers_that_the_base_has_not(self, tmp_path, inputs):
        slices = [{"sources": [{"model": inputs["full"], "layer_range": layers}]} for layers in ([0, 2], [1, 2])]
        config = {"merge_method": "passthrough", "slices": slices, "base_model": inputs["base"]}
        self.refused(tmp_path, config, "model.layers.2", lora_rank=2)

    def test_result_in_place(self, tmp_path, inputs):
        config = config_of(inputs, "linear", ["lora0"])
        merge(config, tmp_path / "old", lora_rank=2)
        with pytest.raises(FileExistsError, match="--overwrite"):
            merge(config, tmp_path / "old", lora_rank=2)


def test_the_command(tmp_path, inputs, capsys):
    config = config_of(inputs, "task_arithmetic", ["lora0", "lora1"])
    (tmp_path / "c.yml").write_text(json.dumps(config))
    arguments = ["merge", str(tmp_path / "c.yml"), str(tmp_path / "out"), "--lora-rank", "3"]
    assert main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "LoRA of rank 3 on 6 modules" in printed and "energy is lost" in printed
    files = sorted(result_bytes(tmp_path / "out"))
    assert files == ["adapter_config.json", "adapter_model.safetensors", "mergekit_config.yml", "residuals.json"]
    assert str(tmp_path) not in (tmp_path / "out" / "mergekit_config.yml").read_text()
