"""`hf-transfer-ext transfer`: the method follows the bases, and the comparison is printed and published."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.command import trainer_from_words
from hf_transfer_ext.adapters.transfer.compare import RANDOM, SOURCE_ADAPTED, TARGET_BASE
from hf_transfer_ext.adapters.transfer.trainer import read_texts
from hf_transfer_ext.cli import main
from hf_transfer_ext.hub.record import read_record


@pytest.fixture
def folder(tmp_path):
    for name, seed in (("base", 0), ("again", 0), ("other", 3)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "lora")
    rows = [{"q": f"Is it {name}?", "a": "no"} for name in ("Ada", "Bob")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def words(folder, *more, target="again"):
    return ["transfer", str(folder / "lora"), str(folder / target), str(folder / "out"), *more]


def test_a_copy_where_the_bases_are_equal(folder, capsys):
    assert main(words(folder)) == 0
    printed = capsys.readouterr().out
    assert "related as: same" in printed and "Transferred by copy" in printed
    assert "peft loads it." in printed and "vllm loads it, started with --enable-lora." in printed
    written = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folder / "again")
    record = read_record(folder / "out")
    assert record.config["lineage"]["relation"] == "same" and record.config["lineage"]["recommended"] == "none"
    assert "The layers are equal" in " ".join(record.notes["Lineage of the bases"])
    card = (folder / "out" / "README.md").read_text()
    assert "## Lineage of the bases" in card and "vllm: loads it. Start it with `--enable-lora`." in card
    assert not (folder / "out.transfer").exists()


def test_the_comparison_is_printed_and_published(folder, capsys):
    columns = ["--test-data", str(folder / "test.jsonl"), "--columns", "{question: q, answer: a}"]
    assert main(words(folder, *columns, "--template", "plain")) == 0
    printed = capsys.readouterr().out
    for part in ("accuracy", SOURCE_ADAPTED, TARGET_BASE, RANDOM, "transferred", "not measured: true data"):
        assert part in printed, part
    record = read_record(folder / "out")
    assert [m.name for m in record.metrics] == ["accuracy", "negative_flip_rate"]  # an untrained adapter gains nothing
    assert record.metrics[0].dataset == "test.jsonl"
    assert {SOURCE_ADAPTED, TARGET_BASE, RANDOM, "copy"} <= set(record.compared)
    said = " ".join(record.not_measured)
    assert "true data: no training data was given" in said and "gains nothing on the test data" in said
    assert "next to a copy" not in said
    assert "test.jsonl" in {one.name for one in record.inputs}
    assert "negative_flip_rate" in (folder / "out" / "README.md").read_text()


def test_refused(folder, capsys):
    for more, said in (
        (["--method", "trans_lra"], "Did you mean 'trans_lora'"),
        (["--method", "trans_lora", "--rank", "2"], "`max_rank` means nothing to the method 'trans_lora'"),
        (["--method", "copy", "--learn", "logits"], "`learn` means nothing to the method 'copy'"),
        (["--learn", "both"], "`learn` must be one of answers, logits"),
        (["--settings", "{row: 3}"], "Did you mean 'rows'"),
        (["--test-data", str(folder / "test.jsonl")], "Row 0 of `eval_dataset` has no text as its question"),
    ):
        assert main(words(folder, *more)) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (folder / "out").exists()


def test_texts_of_a_file(folder):
    (folder / "texts.json").write_text('["one", "two"]')
    assert read_texts(folder / "texts.json") == ["one", "two"]
    trainer = trainer_from_words("a", "b", "c", method="ridge", texts=str(folder / "texts.json"))
    assert trainer.text_rows == ["one", "two"] and trainer.args.output_dir == "c"
    with pytest.raises(ValueError, match=r"Row 0 of .*has no text in a column 'text'; it has q, a"):
        read_texts(folder / "test.jsonl")
