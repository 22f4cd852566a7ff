import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_transfer_ext.trainers.saving import last_checkpoint, refuse_sharding, save_whole, training_folder


def trainer_of(model, folder):
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to="none"))


def test_saved_weights_are_whole_and_hold_no_pickle(tmp_path):
    model = tiny_llama()
    folder = save_whole(trainer_of(model, tmp_path / "t"), tmp_path / "deep" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    pairs = zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not list(folder.glob("*.bin")) and [p.name for p in folder.parent.iterdir()] == ["model"]
    save_whole(trainer_of(tiny_llama(5), tmp_path / "t"), folder)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, tiny_llama(5).lm_head.weight)


def test_a_trainer_that_writes_nothing_is_noticed(tmp_path):
    trainer = trainer_of(tiny_llama(), tmp_path / "t")
    trainer.save_model = lambda folder, **_: (tmp_path / ".model.partial-save").mkdir()
    with pytest.raises(OSError, match="no safetensors weights"):
        save_whole(trainer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_newest_whole_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    for step, state in ((2, "{}"), (10, json.dumps({"global_step": 10})), (12, '{"global'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_what_an_earlier_run_left_is_used_removed_or_refused(tmp_path):
    out = tmp_path / "out"
    folder = training_folder(out, resume=False, overwrite=False)
    assert folder == tmp_path / "out.training" and not folder.exists()
    (folder / "teacher").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"--resume_from_checkpoint true, or start anew by --overwrite"):
        training_folder(out, resume=False, overwrite=False)
    assert (training_folder(out, resume=True, overwrite=False) / "teacher").exists()
    training_folder(out, resume=False, overwrite=True)
    assert not folder.exists()


def test_only_what_a_run_left_is_removed(tmp_path):
    folder = tmp_path / "out.training"
    (folder / "student").mkdir(parents=True)
    (folder / ".student.partial-save").mkdir()
    with pytest.raises(ValueError, match="holds the input"):
        training_folder(tmp_path / "out", resume=False, overwrite=True, inputs=[None, "org/name", folder / "student"])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        training_folder(tmp_path / "out", resume=False, overwrite=True)
    assert (folder / "notes.txt").exists() and (folder / "student").exists()
    (folder / "notes.txt").unlink()
    training_folder(tmp_path / "out", resume=False, overwrite=True)
    assert not folder.exists()


def test_a_trainer_replaces_a_result_and_no_other_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    trainer = trainer_of(tiny_llama(), tmp_path / "t")
    trainer.save_model = lambda folder, **_: pytest.fail("saved before it looked")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_whole(trainer, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_jobs_that_merge_or_cut_weights_refuse_every_way_of_sharding_them(monkeypatch):
    whole, by_argument = SimpleNamespace(fsdp=""), SimpleNamespace(fsdp="full_shard")
    refuse_sharding(whole, "Do that first.")
    with pytest.raises(ValueError, match=r"shard the weights.* Do that first\."):
        refuse_sharding(by_argument, "Do that first.")
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="shard the weights"):
        refuse_sharding(whole, "Do that first.")
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shard the weights"):
        refuse_sharding(whole, "Do that first.")
