"""The distillation recipe from its command line to the Hub and back, on models made on the spot."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from teachers.test_server import server  # noqa: F401
from tiny import byte_tokenizer, tiny_llama
from tiny_tokenizers import byte_fallback, byte_level

from hf_transfer_ext import DistillationConfig, DistillationTrainer
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.models.loading import load_model, load_tokenizer
from hf_transfer_ext.recipe import CONFIGS, parse_recipe
from hf_transfer_ext.recipes import distill
from hf_transfer_ext.recipes.run import TRAINER_GROUPS

TEXTS = ["gold is a metal", "paris is a city", "iron is a metal", "rome is a city", "tin is a metal"] * 4


@pytest.fixture
def setup(tmp_path):
    """A teacher and data on disk, and the arguments of a run of a few steps."""
    tiny_llama(1, num_hidden_layers=3).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "data").mkdir()
    for split, texts in (("train", TEXTS), ("test", ["lead is a metal", "oslo is a city"])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    config = {
        "output_dir": str(tmp_path / "out"),
        "teacher": str(tmp_path / "teacher"),
        "dataset": str(tmp_path / "data"),
        "columns": {"text": "body"},
        "student_layers": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_steps": 2,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(folder, *extra):
    return distill.main(["--config", str(folder / "config.yaml"), *extra])


def values(measured, name):
    return {model: m.value for model, found in measured.items() for m in found if m.name == name}


def test_teach_trim_cut_distil_compare_save_push_and_pull(setup, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    repo = f"{hub.user}/student"
    measured = run(
        setup, "--teach_steps", "3", "--trim_vocabulary", "true", "--compare_with_ce", "true",
        "--push_to_hub", "true", "--hub_model_id", repo,
    )  # fmt: skip
    assert list(measured) == ["teacher", "student before", "student", "twin without teacher"]
    divergence = values(measured, "kl_to_reference")
    assert set(divergence) == {"student before", "student", "twin without teacher"}
    assert divergence["student"] < divergence["student before"]
    nats, gained = values(measured, "nats_per_token"), values(measured, "nats_gained")
    assert gained == {"student": pytest.approx(nats["twin without teacher"] - nats["student"], abs=1e-5)}
    printed = capsys.readouterr().out
    assert "kl_to_reference ↓" in printed and "train the twin" in printed and repo in printed

    out = setup / "out"
    assert {"model.safetensors", "README.md", "hf_transfer_ext.json", "comparison.png", "vocabulary_map.json"} <= {
        p.name for p in out.iterdir()
    }
    record = read_record(out)
    assert record.job == "distillation" and [i.role for i in record.inputs] == ["teacher", "dataset"]
    assert {m.name: m.value for m in record.metrics}["kl_to_reference"] == divergence["student"]
    assert "twin without teacher" in record.compared and "train the twin" in [s.name for s in record.stages]
    for file in ("README.md", "hf_transfer_ext.json", "config.json"):
        assert str(setup) not in (out / file).read_text()

    student, pulled = load_model(out), load_model(repo)
    ids = torch.tensor([load_tokenizer(repo)("tin is")["input_ids"]])
    torch.testing.assert_close(pulled(ids).logits, student(ids).logits)
    assert student.config.num_hidden_layers == 1 and student.config.vocab_size < 258 + 8
    assert "distillation" in hub.files(repo)["README.md"].decode()


def test_the_student_learns_from_some_rows_and_its_teacher_from_all(setup, monkeypatch):
    seen, train = [], DistillationTrainer.train

    def noted(trainer, **options):
        seen.append(len(trainer.train_dataset))
        return train(trainer, **options)

    monkeypatch.setattr(DistillationTrainer, "train", noted)
    run(setup, "--train_rows", "6", "--teach_steps", "1", "--compare_with_ce", "true")
    assert seen == [20, 6, 6]


def test_an_existing_result_is_refused_before_work_and_replaced_on_request(setup):
    run(setup, "--max_steps", "1")
    before = (setup / "out" / "hf_transfer_ext.json").read_text()
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(setup)
    assert (setup / "out" / "hf_transfer_ext.json").read_text() == before
    run(setup, "--overwrite", "true", "--max_steps", "1")
    assert (setup / "out" / "hf_transfer_ext.json").read_text() != before


def test_an_interrupted_recipe_goes_on_to_the_same_student(setup, monkeypatch):
    run(setup, "--teach_steps", "2")
    whole = load_model(setup / "out").state_dict()
    shutil.rmtree(setup / "out")
    shutil.rmtree(setup / "out.training")

    class Stop(Exception):
        pass

    original = distill.DistillationTrainer.training_step

    def step(self, *args, **kwargs):
        if self.teacher is not None and self.state.global_step == 3:
            raise Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(distill.DistillationTrainer, "training_step", step)
    with pytest.raises(Stop):
        run(setup, "--teach_steps", "2")
    assert not (setup / "out").exists() and (setup / "out.training" / "teacher" / "config.json").exists()
    with pytest.raises(FileExistsError, match="An earlier run left its checkpoints"):
        run(setup, "--teach_steps", "2")
    monkeypatch.setattr(distill.DistillationTrainer, "training_step", original)
    run(setup, "--teach_steps", "2", "--resume_from_checkpoint", "true")
    resumed = load_model(setup / "out").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_student_of_its_own_and_streaming_data(setup):
    tiny_llama(7, hidden_size=16, num_hidden_layers=1).save_pretrained(setup / "student")
    byte_tokenizer().save_pretrained(setup / "student")
    measured = run(setup, "--student", str(setup / "student"), "--student_layers", "none", "--streaming", "true")
    assert list(measured) == ["teacher", "student before", "student"]
    assert load_model(setup / "out").config.hidden_size == 16
    assert [i.role for i in read_record(setup / "out").inputs] == ["teacher", "dataset", "student"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("linear_expansion",), marks=pytest.mark.slow),
        ("stage_sharing", "--student_options", "{stages: [2, 1], representative: first}"),
    ],
    ids=lambda options: options[0],
)
def test_a_learngene_is_distilled_and_expanded(setup, monkeypatch, options):
    run(setup, "--learngene_steps", "3", "--student_layers", "2", "--student_init", *options)
    record = read_record(setup / "out")
    assert record.config["learngene_steps"] == 3 and load_model(setup / "out").config.num_hidden_layers == 2
    learned = load_model(setup / "out.training" / "learngene").state_dict()
    monkeypatch.setattr(distill.DistillationTrainer, "train", lambda self, **_: None)
    run(setup, "--student_layers", "2", "--overwrite", "true", "--student_init", *options)
    plain = load_model(setup / "out").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert learned[name].shape == plain[name].shape and not torch.equal(learned[name], plain[name])


@pytest.mark.parametrize("options, message", [
    (["--student", "me", "--student_init", "last_depth"], "`student_init` is 'last_depth', but the student is named"),
    (["--student", "me"], "`student_layers` is 1, but the student is named by `student`"),
    (["--student_revision", "v2"], "`student_revision` is 'v2', but the student is made from the teacher"),
    (["--model_init_kwargs", "{dtype: bfloat16}"], "`model_init_kwargs` is .*made from the teacher"),
    (["--learngene_steps", "3"], "uniform_depth has no model with shared layers"),
])  # fmt: skip
def test_settings_of_a_student_without_effect_are_refused(setup, options, message):
    with pytest.raises(ValueError, match=message):
        run(setup, *options)


def test_what_zero_3_cannot_do_is_refused(setup, monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 shards models while they are loaded"):
        run(setup)
    assert not (setup / "out").exists()


@pytest.mark.parametrize(
    "extra, error, message",
    [
        (["--teacher", "./absent"], FileNotFoundError, "absent"),
        (["--dataset", "./absent.jsonl"], FileNotFoundError, "no data file or folder"),
        (["--columns", '{"text": "bdy"}'], ValueError, "Did you mean 'body'"),
        (["--student_layers", "9"], ValueError, "9"),
        (["--student_init", "unifrom_depth"], ValueError, "Did you mean 'uniform_depth'"),
        (["--los", "forward_kl"], ValueError, "Did you mean 'loss'"),
        (["--max_length", "9999"], ValueError, "takes at most 512 tokens"),
        (["--train_rows", "21"], ValueError, "has 20 rows in 'train'"),
        (["--train_rows", "6", "--streaming", "true"], ValueError, "draws from all rows, but `streaming`"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(setup, extra, error, message):
    with pytest.raises(error, match=message):
        run(setup, *extra)
    assert not (setup / "out").exists()


def own_student(setup, tokenizer=byte_tokenizer, **config):
    """A student on disk, and the words that name it."""
    tiny_llama(5, **config).save_pretrained(setup / "student")
    tokenizer().save_pretrained(setup / "student")
    return ["--student", str(setup / "student"), "--student_layers", "none"]


def test_a_dry_run_tells_the_memory_of_the_teacher_and_leaves_nothing(setup, capsys):
    before = sorted(setup.rglob("*"))
    assert run(setup, "--dry_run", "true", "--teach_steps", "5") == {}
    printed = capsys.readouterr().out
    held = sum(p.numel() * 4 for p in tiny_llama(1, num_hidden_layers=3).parameters()) / 1e9
    assert f"Memory of the frozen teachers: teacher {held:.3g} GB" in printed and "Training rows: 20" in printed
    assert sorted(setup.rglob("*")) == before
    run(setup)
    with pytest.raises(FileExistsError):
        run(setup, "--dry_run", "true")


def test_a_complete_cache_needs_no_teacher(setup):
    words = [*own_student(setup), "--teacher_cache", str(setup / "cache"), "--max_steps", "5"]
    run(setup, *words, "--num_train_epochs", "1")
    first = load_model(setup / "out").state_dict()
    shutil.rmtree(setup / "teacher")
    shutil.rmtree(setup / "out.training")
    measured = run(setup, *words, "--teacher", "none", "--overwrite", "true")
    assert list(measured) == ["student before", "student"]
    assert [i.role for i in read_record(setup / "out").inputs] == ["dataset", "student"]
    second = load_model(setup / "out").state_dict()
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_a_server_of_another_tokenizer_teaches_likelihoods(setup, server):  # noqa: F811
    server.model, server.tokenizer = tiny_llama(2, vocab_size=len(byte_fallback())), byte_fallback()
    byte_fallback().save_pretrained(setup / "big")
    server.models[str(setup / "big")] = {"max_model_len": 512}
    config = yaml.safe_load((setup / "config.yaml").read_text())
    served = {"server": server.url, "server_model": str(setup / "big")}
    (setup / "config.yaml").write_text(yaml.safe_dump({**config, "teacher": served, "loss": "alm"}))
    measured = run(setup, *own_student(setup))
    assert list(measured) == ["student before", "student"]
    record = read_record(setup / "out")
    assert any("different tokenizers" in one for one in record.not_measured)
    assert "tokens match exactly" in record.config["vocabulary_alignment"]


def test_several_teachers_and_a_hidden_loss_from_the_file(setup):
    tiny_llama(2).save_pretrained(setup / "other")
    byte_tokenizer().save_pretrained(setup / "other")
    config = yaml.safe_load((setup / "config.yaml").read_text())
    entries = [{"model": config.pop("teacher"), "weight": 2}, {"model": str(setup / "other")}]
    words = own_student(setup)
    (setup / "config.yaml").write_text(yaml.safe_dump({**config, "teachers": entries}))
    run(setup, *words)
    record = read_record(setup / "out")
    assert [i.role for i in record.inputs] == ["dataset", "student", "teacher", "teacher"]
    assert set(record.config["frozen_teacher_bytes"]) == {"teacher", "other"}
    inside = {"name": "forward_kl", "hidden_loss": "hidden_mse", "layer_map": [[0, 1], [1, -1]]}
    (setup / "config.yaml").write_text(yaml.safe_dump({**config, "teacher": entries[0]["model"], "loss": inside}))
    run(setup, *words, "--overwrite", "true")
    assert read_record(setup / "out").config["hidden_loss"] == "hidden_mse"


def test_a_student_with_another_tokenizer_than_its_teacher(setup, capsys):
    words = own_student(setup, byte_level, vocab_size=len(byte_level()))
    measured = run(setup, *words, "--loss", "gold")
    assert list(measured) == ["student before", "student"]
    record = read_record(setup / "out")
    assert "tokens match exactly" in record.config["vocabulary_alignment"]
    assert any("different tokenizers" in line for line in record.not_measured)
    run(setup, *words, "--loss", "gold", "--dry_run", "true", "--output_dir", str(setup / "new"))
    assert "tokens match exactly" in capsys.readouterr().out


def test_an_adapters_own_base_teaches_it(setup):
    student = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False, base_model_name_or_path="x"))
    base = setup / "base"
    tiny_llama(1).save_pretrained(base)
    student.peft_config["default"].base_model_name_or_path = str(base)
    student.save_pretrained(setup / "adapter")
    byte_tokenizer().save_pretrained(setup / "adapter")
    words = ["--teacher", "none", "--student", str(setup / "adapter"), "--student_layers", "none"]
    run(setup, *words, "--teacher_adapter", "base", "--test_split", "none")
    before, after = (load_file(setup / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--teacher", "none"], "Name one `teacher`.*got none"),
        (["--teachers", "[{model: a}, {model: b}]"], "got .*teacher and `teachers`"),
        (["--teacher", "none", "--teachers", "[{model: a}, {model: b}]"], "Name the `student`"),
        (["--loss", "uld"], "for a student with another tokenizer"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(setup, words, message):
    with pytest.raises(ValueError, match=message):
        run(setup, *words)
    assert not (setup / "out").exists()


@pytest.mark.parametrize("path", sorted((CONFIGS / "distill").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_accepted(path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments._validate_args", lambda self: None)  # bf16 needs its GPU
    argv = ["--config", str(path)]
    job, args = parse_recipe(distill.DistillArguments, DistillationConfig, argv=argv, groups=TRAINER_GROUPS)
    assert job.dataset and args.output_dir.startswith("runs/")
