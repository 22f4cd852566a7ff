"""The chain of all jobs, on a model made on the spot."""

import json

from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.recipes import quickstart


def test_the_chain_leaves_a_card_at_every_stage_and_one_record_of_it_all(tmp_path, capsys):
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
            "--task_people", "3",
        ]
    )  # fmt: skip
    assert list(measured) == ["student", "moved LoRA", "+ people", "student + LoRA", "merged", "unlearned"]
    value = {name: {m.name: m.value for m in found} for name, found in measured.items()}
    keep = "people to keep: answer_probability"
    assert value["+ people"][keep] > value["student"][keep]
    # The LoRA has full rank here, so both ways to the learnt model, and their mean, are one.
    assert abs(value["student + LoRA"][keep] - value["+ people"][keep]) < 1e-3
    assert abs(value["merged"][keep] - value["+ people"][keep]) < 1e-3
    for stage in ("student", "lora", "moved", "learnt", "adapter", "merged", "unlearned"):
        assert (root / stage / "README.md").read_text().startswith("---")
        assert str(tmp_path) not in (root / stage / "README.md").read_text()
    # The LoRA moved from the teacher to the student, and was measured beside its controls.
    moved = read_record(root / "moved")
    assert moved.config["lineage"]["relation"] == "related" and {"source adapter", "random"} <= set(moved.compared)
    assert measured["moved LoRA"][0].name == "accuracy" and measured["moved LoRA"][0].examples == 6
    jobs = [record.job for record in read_record(root / "unlearned").history()]
    assert jobs == ["distillation", "fine-tuning", "extraction", "merging", "unlearning"]
    printed = capsys.readouterr().out
    assert "\nextract " in printed and "distillation -> fine-tuning" in printed
    assert (root / "quickstart.png").exists()
