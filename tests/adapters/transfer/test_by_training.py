"""From folder to folder, twice: what one base learned, a second and a third one answer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from adapters.transfer.test_trans_lora import INPUTS, SETTINGS, base
from evals.audit.planted_people import PLAIN, taught
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import byte_tokenizer

from hf_transfer_ext.adapters.transfer import by_training
from hf_transfer_ext.adapters.transfer.by_training import train_lora, transfer_by_training
from hf_transfer_ext.adapters.transfer.trans_lora import (
    TransLoraSettings,
    answer_inputs,
    read_discriminator,
    train_discriminator,
)
from hf_transfer_ext.models.loading import load_model

pytestmark = pytest.mark.slow

ANSWER = "no way"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three bases, and an adapter of the first one with its discriminator."""
    root = tmp_path_factory.mktemp("bases")
    for name, seed in (("first", 0), ("second", 7), ("third", 8)):
        copy.deepcopy(base(seed)).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    train_discriminator(load_model(root / "first"), byte_tokenizer(), INPUTS, root / "lora", SETTINGS, template=PLAIN)
    lora = LoraConfig(r=8, target_modules=list(SETTINGS.target_modules), task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(root / "first"), lora)
    taught(adapted, [{"question": question, "answer": ANSWER} for question in INPUTS], steps=60)
    adapted.save_pretrained(root / "lora")
    return root


def answers(base_folder: Path, adapter: Path, work: Path) -> list[str]:
    model = PeftModel.from_pretrained(load_model(base_folder), str(adapter)).eval()
    rows = answer_inputs(model, byte_tokenizer(), INPUTS[:12], SETTINGS, work, template=PLAIN)
    return [row["answer"] for row in rows]


def learned(base_folder: Path, adapter: Path, work: Path) -> int:
    return sum(one.startswith(ANSWER) for one in answers(base_folder, adapter, work))


def test_two_hops(folders, tmp_path):
    once = transfer_by_training(
        folders / "lora", folders / "second", tmp_path / "once", settings=SETTINGS, template=PLAIN
    )
    assert learned(folders / "second", tmp_path / "once", tmp_path / "a") >= 9
    assert once.hops == 1 and once.rows == 10 and 0 < once.acceptance <= 1
    assert not (tmp_path / "once.transfer").exists()
    first, again = read_discriminator(folders / "lora"), read_discriminator(tmp_path / "once")
    assert again.seeds == first.seeds and again.separation == once.separation
    discriminator = json.loads((tmp_path / "once/discriminator/adapter_config.json").read_text())
    assert discriminator["base_model_name_or_path"] == str(folders / "second")
    config = json.loads((tmp_path / "once/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders / "second") and config["r"] == config["lora_alpha"] == 8

    twice = transfer_by_training(
        tmp_path / "once", folders / "third", tmp_path / "twice", settings=SETTINGS, template=PLAIN
    )
    assert learned(folders / "third", tmp_path / "twice", tmp_path / "b") >= 6
    alone = answer_inputs(
        load_model(folders / "third"), byte_tokenizer(), INPUTS[:12], SETTINGS, tmp_path / "c", template=PLAIN
    )
    assert not any(row["answer"].startswith(ANSWER) for row in alone)
    content = json.loads((tmp_path / "twice/transfer.json").read_text())
    (earlier,) = content["earlier_transfers"]
    assert twice.hops == 2 and earlier["source_base"]["name"] == "first" and content["source_base"]["name"] == "second"
    assert content["target_base"]["sha256"]["model.safetensors"] and content["method"] == "trans_lora"
    assert str(tmp_path) not in json.dumps(content)


def test_a_copied_discriminator_is_used_on_its_own_base(folders, tmp_path, monkeypatch):
    options = {"settings": SETTINGS, "template": PLAIN}
    transfer_by_training(folders / "lora", folders / "second", tmp_path / "once", discriminator="copy", **options)
    copied = json.loads((tmp_path / "once/discriminator/adapter_config.json").read_text())
    assert copied["base_model_name_or_path"] == str(folders / "first")
    judges = []
    write = by_training.write_inputs

    def seen(*arguments, judge, **more):
        judges.append(judge.get_base_model().name_or_path)
        return write(*arguments, judge=judge, **more)

    monkeypatch.setattr(by_training, "write_inputs", seen)
    transfer_by_training(tmp_path / "once", folders / "third", tmp_path / "twice", discriminator="none", **options)
    assert judges == [str(folders / "first")]
    assert not (tmp_path / "twice/discriminator").exists() and read_discriminator(tmp_path / "twice").seeds


def test_logits_where_the_vocabularies_agree(folders, tmp_path):
    transfer_by_training(
        folders / "lora", folders / "second", tmp_path / "out", settings=SETTINGS, template=PLAIN, learn="logits",
        discriminator="none",
    )  # fmt: skip
    assert learned(folders / "second", tmp_path / "out", tmp_path / "a") >= 9


def test_from_a_closed_form(folders, tmp_path):
    few = TransLoraSettings(**{**SETTINGS.__dict__, "epochs": 1.0, "learning_rate": 1e-9, "rows": 10})
    transfer_by_training(
        folders / "lora", folders / "first", tmp_path / "out", settings=few, template=PLAIN, start="copy",
        discriminator="none",
    )  # fmt: skip
    assert answers(folders / "first", tmp_path / "out", tmp_path / "a") == answers(
        folders / "first", folders / "lora", tmp_path / "b"
    )


def test_training_continues_from_its_last_checkpoint(folders, tmp_path, monkeypatch):
    rows = [{"question": question, "answer": ANSWER} for question in INPUTS[:16]]
    few = TransLoraSettings(**{**SETTINGS.__dict__, "epochs": 4.0})
    whole = train_lora(folders / "second", byte_tokenizer(), rows, tmp_path / "whole", few, template=PLAIN)

    from transformers import Trainer

    step, steps = Trainer.training_step, []

    def dies(self, *arguments, **more):
        steps.append(self.state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_lora(folders / "second", byte_tokenizer(), rows, tmp_path / "cut", few, template=PLAIN)
    tuned = train_lora(folders / "second", byte_tokenizer(), rows, tmp_path / "cut", few, template=PLAIN)
    assert steps[6:] == [4, 5, 6, 7]  # two epochs of two steps were saved
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], tensor)
    with pytest.raises(ValueError, match="belong to other data or settings"):
        train_lora(folders / "second", byte_tokenizer(), rows[:8], tmp_path / "cut", few, template=PLAIN)


def test_an_interrupted_transfer_keeps_its_finished_stages(folders, tmp_path, monkeypatch):
    options = {"settings": SETTINGS, "template": PLAIN, "discriminator": "none"}

    def dies(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(by_training, "train_lora", dies)
        with pytest.raises(KeyboardInterrupt):
            transfer_by_training(folders / "lora", folders / "second", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.transfer/answers.jsonl").is_file()
    with monkeypatch.context() as patch:
        from hf_transfer_ext.adapters.transfer import trans_lora

        patch.setattr(trans_lora, "generate", dies)  # nothing is written or answered again
        transfer_by_training(folders / "lora", folders / "second", tmp_path / "out", **options)
    assert learned(folders / "second", tmp_path / "out", tmp_path / "a") >= 9


class TestRefused:
    def test_settings(self, folders, tmp_path):
        for options, said in (
            ({"learn": "both"}, "`learn` must be one of answers, logits"),
            ({"discriminator": "keep"}, "`discriminator` must be one of"),
            ({"settings": TransLoraSettings(rows=3)}, "at least 10 synthetic inputs"),
            ({"start": "copi", "settings": SETTINGS, "discriminator": "none"}, "Did you mean 'copy'"),
        ):
            with pytest.raises(ValueError, match=said):
                transfer_by_training(folders / "lora", folders / "second", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_no_seeds_and_another_base(self, folders, tmp_path):
        adapted = get_peft_model(load_model(folders / "first"), LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "plain")
        with pytest.raises(ValueError, match=r"has no transfer_seeds\.json"):
            transfer_by_training(tmp_path / "plain", folders / "second", tmp_path / "out")
        from tiny import tiny_llama

        tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wide")
        byte_tokenizer().save_pretrained(tmp_path / "wide")
        with pytest.raises(ValueError, match="does not fit"):
            transfer_by_training(
                folders / "lora", folders / "second", tmp_path / "out", source_base=tmp_path / "wide",
                settings=SETTINGS, discriminator="none",
            )  # fmt: skip

    def test_logits_of_another_vocabulary(self, folders, tmp_path):
        load_model(folders / "second").save_pretrained(tmp_path / "other")
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<more>"])
        tokenizer.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="Use learn='answers'"):
            transfer_by_training(
                folders / "lora", tmp_path / "other", tmp_path / "out", learn="logits", settings=SETTINGS,
                discriminator="none",
            )  # fmt: skip
