"""The recipe of a transfer, from a source adapter that it teaches to a card with the comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.compare import SOURCE_ADAPTED, TARGET_BASE, TRUE_DATA
from hf_transfer_ext.cli import main as command
from hf_transfer_ext.data.fictitious_people import sorted_statements
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.recipes import transfer_lora

ROOT = Path(__file__).parents[2]


def write_config(folder, **changes):
    for name, seed in (("source", 0), ("target", 1)):
        tiny_llama(seed=seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    content = {
        "people": 9, "kinds": 2, "template": "plain", "output_dir": str(folder / "out"),
        "source": {"adapter": str(folder / "lora"), "source_base": str(folder / "source"), "teach_epochs": 2},
        "target_base": str(folder / "target"), "method": {"name": "trans_lora", "discriminator": "none"},
        "training": {"epochs": 1, "rank": 2, "batch_size": 4}, "rows": 4, "input_tokens": 8, "answer_tokens": 4,
        **changes,
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(content))
    return ["--config", str(folder / "config.yaml")]


def test_a_taught_adapter_is_moved_and_compared(tmp_path, capsys):
    trainer = transfer_lora.main(write_config(tmp_path))
    assert trainer.lineage.relation == "unrelated" and trainer.report.rows > 0
    printed = capsys.readouterr().out
    assert "Transferred by trans_lora." in printed and SOURCE_ADAPTED in printed and "vllm loads it" in printed
    record = read_record(tmp_path / "out")
    assert {SOURCE_ADAPTED, TARGET_BASE, TRUE_DATA, "random"} <= set(record.compared)
    assert record.metrics[0].name == "accuracy" and record.metrics[0].examples == 6
    assert [stage.name for stage in record.stages] == ["transfer", "compare"]
    source = read_record(tmp_path / "lora")
    assert source.job == "fine-tuning" and [one.role for one in source.inputs] == ["base"]
    seeds = json.loads((tmp_path / "out" / "transfer_seeds.json").read_text())
    assert len(seeds["seeds"]) == 5 and seeds["separation"] is None
    loaded = PeftModel.from_pretrained(load_model(tmp_path / "target"), tmp_path / "out")
    assert loaded.peft_config["default"].r == 2
    for folder in ("out", "lora"):
        assert str(tmp_path) not in (tmp_path / folder / "README.md").read_text()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "target", "lora", "out", "config.yaml"}


@pytest.mark.slow
def test_the_script_under_a_launcher(tmp_path):
    script = str(ROOT / "recipes" / "transfer_lora.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", script]
    run = subprocess.run([*launch, *write_config(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    assert read_record(tmp_path / "out").command[0] == "transfer_lora" and "vllm loads it" in run.stdout


def test_several_processes_are_refused(tmp_path, monkeypatch):
    words = write_config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Start it with --num_processes 1"):
        transfer_lora.main(words)


def test_the_command_with_a_config_is_the_recipe(tmp_path, capsys):
    words = write_config(tmp_path, people=0, train_data=str(tmp_path / "absent.jsonl"))
    assert command(["transfer", *words, "--dtype", "float8"]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"people": 2}, "at least 3 people"),
        ({"train_data": "x.jsonl"}, "leave `train_data` and `test_data` out"),
        ({"people": 0}, "needs `source_base` and `train_data`"),
        ({"method": {"name": "copi"}}, "Did you mean 'copy'"),
    ],
)
def test_refused_before_any_work(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        transfer_lora.main(write_config(tmp_path, **changes))
    assert not (tmp_path / "lora").exists() and not (tmp_path / "out").exists()


def test_statements_are_split_by_person():
    train, test = sorted_statements(9, facts=3)
    assert len(train) == 18 and len(test) == 9
    assert {row["answer"] for row in test} == {"birthplace", "birth year", "profession"}
    assert not {row["question"] for row in train} & {row["question"] for row in test}
