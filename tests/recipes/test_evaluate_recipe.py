import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from recipes import evaluate


def adapter(folder, seed, **config):
    torch.manual_seed(seed)
    options = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_llama(**config), options).save_pretrained(folder)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    rows = [{"question": f"Q{i}?", "answer": f"yes {i}"} for i in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_adapters_of_one_base_stand_side_by_side(tmp_path, model_folder, capsys):
    adapter(tmp_path / "one", 1)
    adapter(tmp_path / "two", 2)
    words = f"--models {model_folder} --adapters {tmp_path}/one {tmp_path}/two --data {tmp_path}/own.jsonl"
    words += f" --metrics perplexity,kl_to_reference --reference base --output_dir {tmp_path}/out"
    found = evaluate.main(words.split())
    assert list(found) == ["base", "one", "two"]
    kl = {name: m.value for name, values in found.items() for m in values if m.name == "own kl_to_reference"}
    assert kl["base"] == pytest.approx(0.0, abs=1e-6) and kl["one"] > 1e-4 and kl["two"] > 1e-4
    assert "own perplexity" in capsys.readouterr().out
    rows = (tmp_path / "out" / "two" / "own" / "per_example.jsonl").read_text().splitlines()
    assert len(rows) == 3 and json.loads(rows[1])["answer"] == "yes 1"
    assert (tmp_path / "out" / "measurements.png").stat().st_size > 5000


def test_an_adapter_of_another_base_is_named(tmp_path, model_folder):
    adapter(tmp_path / "wide", 1, hidden_size=64)
    words = f"--models {model_folder} --adapters {tmp_path}/wide --data {tmp_path}/own.jsonl --output_dir {tmp_path}/o"
    with pytest.raises(ValueError, match="wide' does not fit"):
        evaluate.main(words.split())


def test_a_metric_that_is_not_known_is_told_first(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'perplexity'"):
        evaluate.main(["--models", "nowhere/at-all", "--metrics", "perplexty"])
