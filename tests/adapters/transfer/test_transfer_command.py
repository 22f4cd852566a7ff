"""The method is chosen by the bases, and arguments of another method are refused."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer import command
from hf_transfer_ext.adapters.transfer.by_training import TrainedTransferReport
from hf_transfer_ext.adapters.transfer.command import transfer
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings


@pytest.fixture
def folder(tmp_path):
    for name, seed in (("base", 0), ("again", 0), ("other", 3)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "lora")
    return tmp_path


def test_a_copy_where_the_bases_are_equal(folder):
    report = transfer(folder / "lora", folder / "again", folder / "out")
    assert report.method == "copy"
    written = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folder / "again")


def test_training_where_they_are_unrelated(folder, monkeypatch):
    calls = []
    report = TrainedTransferReport("out", 20, 1.0, None, 1, 0.0)
    monkeypatch.setattr(command, "transfer_by_training", lambda *given, **more: calls.append((given, more)) or report)
    settings = TransLoraSettings(rows=20)
    assert transfer(folder / "lora", folder / "other", folder / "out", settings=settings, learn="logits") is report
    ((given, more),) = calls
    assert given == (folder / "lora", folder / "other", folder / "out")
    assert more["settings"] is settings and more["learn"] == "logits" and more["source_base"] is None


def test_refused(folder):
    for options, said in (
        ({"method": "trans_lra"}, "Did you mean 'trans_lora'"),
        ({"method": "trans_lora", "rank": 2}, "`rank` means nothing to the method 'trans_lora'"),
        ({"method": "copy", "settings": TransLoraSettings()}, "`settings` means nothing to the method 'copy'"),
        ({"method": "copy", "learn": "logits"}, "`learn` means nothing to the method 'copy'"),
    ):
        with pytest.raises(ValueError, match=said):
            transfer(folder / "lora", folder / "again", folder / "out", **options)
    assert not (folder / "out").exists()
