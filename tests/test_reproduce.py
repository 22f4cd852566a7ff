"""Results made again from their records: the same bytes, other inputs refused, and training by its measurements."""

import json
import shutil

import pytest
import torch
import yaml
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.convert import convert_to_lora
from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.adapters.resize import resize_lora
from hf_transfer_ext.adapters.transfer.run import transfer_lora
from hf_transfer_ext.cli import main
from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.hub.publish import push
from hf_transfer_ext.hub.record import RECORD_FILE, read_record
from hf_transfer_ext.merging.moe.assemble import assemble
from hf_transfer_ext.merging.run import merge
from hf_transfer_ext.recipes import distill
from hf_transfer_ext.reproduce import reproduce


@pytest.fixture
def models(tmp_path):
    """Two fine-tunes that share the last component of their paths, and their base."""
    base = tiny_llama(0)
    for number, name in enumerate(("base", "one/model", "two/model")):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01 * number)
        base.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def config_of(models):
    return {
        "merge_method": "dare_ties", "base_model": str(models / "base"), "dtype": "float32",
        "models": [{"model": str(models / name), "parameters": {"weight": 0.5, "density": 0.5}}
                   for name in ("one/model", "two/model")],
        "parameters": {"normalize": True},
    }  # fmt: skip


def merged(models, out):
    (models / "merge.yml").write_text(yaml.safe_dump(config_of(models)))
    merge(models / "merge.yml", out, max_shard_bytes=60_000)


def mixed(models, out):
    experts = [{"source_model": str(models / name), "positive_prompts": [name]} for name in ("one/model", "two/model")]
    assemble({"base_model": str(models / "base"), "gate_mode": "hidden", "dtype": "float32", "experts": experts}, out)


def extracted(models, out):
    extract_lora(models / "base", models / "one/model", out, rank=3)


def resized(models, out):
    extract_lora(models / "base", models / "one/model", models / "lora", rank=3)
    resize_lora(models / "lora", out, rank=2)


def converted(models, out):
    extract_lora(models / "base", models / "one/model", models / "lora", rank=3)
    convert_to_lora(models / "lora", out)


def edited(models, out):
    apply_edit(models / "one/model", out, method="negation", tuned=models / "two/model", options={"strength": 0.5})


def transferred(models, out):
    extract_lora(models / "base", models / "one/model", models / "lora", rank=3)
    transfer_lora(models / "lora", models / "two/model", out, method="copy", force=True)


#: Job -> (how a result is made, names of inputs on the command line -> folders)
JOBS = {
    "merge": (merged, {"base": "base", "input:1": "one/model", "input:2": "two/model"}),
    "moe": (mixed, {"base": "base", "input:1": "one/model", "input:2": "two/model"}),
    "extract": (extracted, {"base": "base", "model": "one/model"}),
    "resize": (resized, {"lora": "lora"}),
    "convert": (converted, {"lora": "lora", "base": "base"}),
    "edit": (edited, {"input:0": "one/model", "input:1": "two/model"}),
    "transfer": (transferred, {"lora": "lora", "base": "base", "model": "two/model"}),
}


@pytest.mark.parametrize("job", JOBS)
def test_the_same_bytes_come_out_again(models, job, capsys):
    make, inputs = JOBS[job]
    out = models / "out"
    make(models, out)
    assert str(models) not in (out / RECORD_FILE).read_text()
    moved = models.with_name(models.name + "-moved")
    shutil.move(models, moved)
    words = [f"{name}={moved / folder}" for name, folder in inputs.items()]
    assert main(["reproduce", str(moved / "out"), "--inputs", *words]) == 0
    printed = capsys.readouterr().out
    assert "equal, by bytes\n" in printed and "differs" not in printed and "changed since" not in printed
    found = reproduce(str(moved / "out"), search=[str(moved)])
    assert found.verdict == "equal" and any(name.endswith(".safetensors") for name in found.files)


def test_a_result_that_was_changed_is_found_out(models):
    merged(models, models / "out")
    path = models / "out" / RECORD_FILE
    content = json.loads(path.read_text())
    content["call"]["config"]["parameters"]["normalize"] = False
    path.write_text(json.dumps(content))
    found = reproduce(str(models / "out"), search=[str(models)])
    assert found.verdict == "differs" and "differs" in found.text()
    assert main(["reproduce", str(models / "out"), "--search", str(models)]) == 1


def test_other_inputs_are_refused(models):
    merged(models, models / "out")
    out = str(models / "out")
    with pytest.raises(FileNotFoundError, match=r"Pass --inputs base=PATH"):
        reproduce(out)
    swapped = [f"base={models / 'base'}", f"input:1={models / 'two/model'}", f"input:2={models / 'one/model'}"]
    with pytest.raises(ValueError, match="not the one that was read"):
        reproduce(out, inputs=swapped)
    with pytest.raises(ValueError, match=r"no input 'bse'. It has: base, input:0"):
        reproduce(out, inputs=["bse=x"])
    with pytest.raises(ValueError, match="name=path"):
        reproduce(out, inputs=["base"])
    with pytest.raises(FileNotFoundError, match="nothing at"):
        reproduce(out, inputs=["base=/nowhere/x"])


def test_what_a_record_cannot_repeat_is_said(models):
    merged(models, models / "out")
    path = models / "out" / RECORD_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "recipe": "SomeTrainer"}))
    with pytest.raises(ValueError, match="Results of the commands audit, cache-teacher, convert, distill"):
        reproduce(str(models / "out"))
    path.write_text(json.dumps({**content, "call": {}}))
    with pytest.raises(ValueError, match="does not hold the call"):
        reproduce(str(models / "out"))
    path.write_text(json.dumps({**content, "call": {**content["call"], "out_dir": "/x", "exec": "rm"}}))
    with pytest.raises(ValueError, match="does not take the recorded call"):
        reproduce(str(models / "out"), search=[str(models)])
    path.write_text(json.dumps({**content, "call": {"config": "input:99"}}))
    with pytest.raises(ValueError, match="names input 99"):
        reproduce(str(models / "out"))
    for key in ("base_model", "models"):
        config = {**content["call"]["config"], key: "org/other" if key == "base_model" else [{"model": "org/other"}]}
        path.write_text(json.dumps({**content, "call": {**content["call"], "config": config}}))
        with pytest.raises(ValueError, match="names 'org/other', which is not one of its inputs"):
            reproduce(str(models / "out"), search=[str(models)])
    code = {"config": {"nested": [{"trust_remote_code": True}]}}
    path.write_text(json.dumps({**content, "recipe": "hf-transfer-ext distill", **code}))
    with pytest.raises(ValueError, match="runs Python code from a repository"):
        reproduce(str(models / "out"))
    path.write_text(json.dumps({**content, "versions": {"torch": "1.0"}, "recipe_sha256": "0" * 64}))
    found = reproduce(str(models / "out"), search=[str(models)])
    assert found.verdict == "equal" and any("torch 1.0 then" in note for note in found.notes)
    assert any("has changed since" in note for note in found.notes)


def test_inputs_on_the_hub_are_read_at_their_commit(hub, models, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.seed("tester/base", models / "base", private=True)
    hub.seed("tester/tuned", models / "one/model")
    extract_lora("tester/base", "tester/tuned@main", models / "out", rank=2)
    hub.seed("tester/tuned", models / "two/model")  # a later commit
    push(models / "out", "tester/lora", token=hub.token)
    assert reproduce("tester/lora").verdict == "equal"
    kept = reproduce("tester/lora", out=str(models / "again"))
    assert kept.folder == str(models / "again") and (models / "again" / "adapter_model.safetensors").is_file()
    with pytest.raises(FileExistsError):
        reproduce("tester/lora", out=str(models / "again"))


@pytest.fixture
def distilled(tmp_path):
    """The result of a few steps of distillation, and the words that made it."""
    tiny_llama(1, num_hidden_layers=3).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    rows = [{"body": f"{metal} is a metal"} for metal in ("gold", "iron", "tin", "lead")] * 5
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {
        "output_dir": tmp_path / "out", "teacher": tmp_path / "teacher", "dataset": tmp_path / "rows.jsonl",
        "columns": "{text: body}", "student_layers": 1, "max_steps": 3, "per_device_train_batch_size": 4,
        "max_length": 32, "use_cpu": "true", "bf16": "false", "report_to": "none", "save_strategy": "no",
        "gradient_checkpointing": "false", "disable_tqdm": "true", "learning_rate": 1e-3,
    }  # fmt: skip
    distill.main([str(word) for name, value in words.items() for word in (f"--{name}", value)])
    return tmp_path


def test_training_is_made_again_and_its_measurements_compared(distilled):
    record = read_record(distilled / "out")
    assert record.defaults["weight_decay"] == 0.0 and record.command and record.recipe_sha256
    given = [f"teacher={distilled / 'teacher'}", f"rows.jsonl={distilled / 'rows.jsonl'}"]
    found = reproduce(str(distilled / "out"), inputs=given)
    assert found.by == "measurements" and found.verdict in ("equal", "within intervals"), found.text()
    assert len(found.metrics) >= len(record.metrics)
    path = distilled / "out" / RECORD_FILE
    content = json.loads(path.read_text())
    content["config"]["learning_rate"] = 0.3
    path.write_text(json.dumps(content))
    found = reproduce(str(distilled / "out"), search=[str(distilled)])
    assert found.verdict == "differs" and "outside" in found.text()
    assert any("the measurements decide" in note for note in found.notes)
    (distilled / "rows.jsonl").write_text('{"body": "other"}\n')
    with pytest.raises(ValueError, match="not the one that was read"):
        reproduce(str(distilled / "out"), inputs=given)
