"""The chain of all jobs, on a model made on the spot."""

import json

import pytest
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.recipes import quickstart
from hf_transfer_ext.recipes.quickstart import STAGES


def test_the_chain_leaves_a_card_at_every_stage_and_one_record_of_it_all(tmp_path, capsys, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    tiny_llama(1).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"text": f"{metal} is a metal"}) + "\n" for metal in ("gold", "iron", "tin", "lead")]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines * 4))
    root = tmp_path / "chain"
    measured = quickstart.main(
        [
            "--output_dir", str(root), "--teacher", str(tmp_path / "teacher"), "--dataset", str(tmp_path / "data"),
            "--student_layers", "2", "--teach_steps", "2", "--distill_steps", "2", "--people", "2", "--facts", "2",
            "--forget_people", "1", "--learn_epochs", "20", "--rank", "32", "--forget_epochs", "2", "--test_rows", "2",
            "--robust_epochs", "8", "--task_people", "3", "--push_to_hub", "tester/chain:demo", "--private", "true",
        ]
    )  # fmt: skip
    assert list(measured) == ["student", "moved LoRA", "+ people", "student + LoRA", "merged", "unlearned", "robust"]
    value = {name: {m.name: m.value for m in found} for name, found in measured.items()}
    keep = "people to keep: answer_probability"
    assert value["+ people"][keep] > value["student"][keep]
    # The LoRA has full rank here, so both ways to the learnt model, and their mean, are one.
    assert abs(value["student + LoRA"][keep] - value["+ people"][keep]) < 1e-3
    assert abs(value["merged"][keep] - value["+ people"][keep]) < 1e-3
    for stage in STAGES:
        assert (root / stage / "README.md").read_text().startswith("---")
        assert str(tmp_path) not in (root / stage / "README.md").read_text()
    # The LoRA moved from the teacher to the student, and was measured beside its controls.
    moved = read_record(root / "moved")
    assert moved.config["lineage"]["relation"] == "related" and {"source adapter", "random"} <= set(moved.compared)
    assert measured["moved LoRA"][0].name == "accuracy" and measured["moved LoRA"][0].examples == 6
    record = read_record(root / "robust")
    jobs = [one.job for one in record.history()]
    assert jobs == ["distillation", "fine-tuning", "extraction", "merging", "unlearning", "unlearning"]
    assert set(record.compared) == {"unlearned", "with noise"}
    assert {one.name for one in record.inputs} == {"unlearned", "forget.jsonl", "retain.jsonl", "data"}
    printed = capsys.readouterr().out
    assert "\nextract " in printed and "distillation -> fine-tuning" in printed
    assert "unlearning -> robust unlearning." in printed
    assert (root / "quickstart.png").exists()
    # The report, and each stage in a folder of its own, in one commit each.
    assert hub.repos[("models", "tester/chain")].private and len(hub.commits("tester/chain")) == 2 + len(STAGES)
    assert read_record("tester/chain:demo").job == "quickstart"
    assert read_record("tester/chain:demo/robust").history()[0].job == "distillation"
    for name, data in hub.files("tester/chain").items():
        assert str(tmp_path).encode() not in data and hub.token.encode() not in data, name
    with pytest.raises(ValueError, match="leave `create_pr` out"):
        quickstart.main(["--push_to_hub", "tester/chain", "--create_pr", "true"])
