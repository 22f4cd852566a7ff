import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.recipes import merge


@pytest.fixture
def parents(tmp_path):
    """A base, a model beside it, and a LoRA on the base."""
    for seed, name in ((0, "base"), (1, "other")):
        tiny_llama(seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    torch.manual_seed(2)
    lora = get_peft_model(
        load_model(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "lora")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"a text {i}"}) + "\n" for i in range(3)))
    return tmp_path


def write_plan(folder, **changes):
    models = [str(folder / "other"), f"{folder / 'base'}+{folder / 'lora'}"]
    plan = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in models],
        **changes,
    }
    (folder / "plan.yml").write_text(yaml.safe_dump(plan))
    return (
        f"--merge_config {folder}/plan.yml --output_dir {folder}/out --data {folder}/own.jsonl --split train".split()
    )


def test_the_result_is_measured_beside_its_parents(parents, capsys):
    done = merge.main([*write_plan(parents), "--template", "plain"])
    lora = load_model(parents / "lora").merge_and_unload().state_dict()
    base, other = load_model(parents / "base").state_dict(), load_model(parents / "other").state_dict()
    for name, tensor in load_model(parents / "out").state_dict().items():
        oracle = base[name] + 0.5 * (other[name] - base[name]) + 0.5 * (lora[name] - base[name])
        assert torch.allclose(tensor, oracle, atol=1e-5), name
    record = read_record(parents / "out")
    roles = {item.name: item.role for item in record.inputs}
    assert record.job == "merging" and roles == {
        "base": "base", "other": "model", "lora": "model", "own.jsonl": "dataset",
    }  # fmt: skip
    assert record.config["merge"]["merge_method"] == "task_arithmetic" and set(record.compared) == {
        "base", "other", "base+lora",
    }  # fmt: skip
    assert [m.name for m in record.metrics] == ["own perplexity"] and len(record.compared) == 3
    assert record.metrics[0].value != next(iter(record.compared.values()))[0].value
    assert "merged" in capsys.readouterr().out
    for file in ("README.md", "mergekit_config.yml", "hf_transfer_ext.json"):
        assert str(parents) not in (parents / "out" / file).read_text(), file
    assert done["report"].method == "task_arithmetic"


def test_the_result_as_an_adapter(parents, capsys):
    done = merge.main([*write_plan(parents), "--template", "plain", "--lora_rank", "4"])
    record = read_record(parents / "out")
    assert [m.name for m in record.metrics] == ["own perplexity", "change left out at rank 4"]
    lost = json.loads((parents / "out" / "residuals.json").read_text())["residual_energy"]
    assert record.metrics[1].value == done["report"].adapter.residual_energy == lost and 0.1 < lost < 1
    assert (parents / "out" / "adapter_model.safetensors").exists() and "is left out" in capsys.readouterr().out
    assert "change left out at rank 4" in (parents / "out" / "README.md").read_text()
    assert str(parents) not in (parents / "out" / "README.md").read_text()


def test_a_typo_is_told_before_anything_is_read(parents):
    with pytest.raises(ValueError, match="Did you mean 'normalize'"):
        merge.main(write_plan(parents, parameters={"normalise": True}))
    assert not (parents / "out").exists()
