"""Evaluations, audits, caches, forget requests and trained transfers, made again from their records."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings, train_discriminator
from hf_transfer_ext.cli import main
from hf_transfer_ext.edits.requests import add_request, apply_requests, revoke_request
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.record import RECORD_FILE, RunRecord, read_record
from hf_transfer_ext.recipes import audit
from hf_transfer_ext.reproduce import reproduce

QUESTIONS = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in ("gold", "iron", "tin", "lead")]


@pytest.fixture
def folder(tmp_path):
    """Two models, an adapter of the first, and rows."""
    for name, seed in (("base", 0), ("other", 3)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    for number, name in enumerate(("lora", "lora2")):
        torch.manual_seed(number)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(), config)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return tmp_path


def run(*words):
    assert main([str(word) for word in words]) == 0, words


def changed(out, **fields):
    """Change the settings of a record."""
    path = out / RECORD_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "config": {**content["config"], **fields}}))


def test_an_evaluation_of_models_on_the_hub_and_on_disk(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.seed("tester/other", folder / "other", private=True)
    run("evaluate", "--models", folder / "base", "tester/other", "--data", folder / "rows.jsonl", "--metrics",
        "answer_probability,kl_to_reference", "--reference", folder / "base", "--template", "plain", "--output_dir",
        folder / "out", "--cache", folder / "cache", "--push_to_hub", "tester/report")  # fmt: skip
    record = read_record(folder / "out")
    assert [item.role for item in record.inputs] == ["reference", "dataset", "model", "model"]
    hub.seed("tester/other", folder / "base")  # a later commit
    shutil.move(folder / "base", folder / "moved")
    found = reproduce("tester/report", search=[str(folder)])
    assert found.verdict == "equal" or found.verdict == "within intervals", found.text()
    assert found.by == "measurements" and len(found.metrics) == 4
    assert {state for *_, state in found.metrics} == {"equal"}, found.text()
    changed(folder / "out", limit=2)
    found = reproduce(str(folder / "out"), search=[str(folder)])
    assert found.verdict in ("differs", "undecided") or any("within" in row for row in found.metrics)
    assert {state for *_, state in found.metrics} != {"equal"}


def test_an_audit_changes_no_card_of_its_inputs(folder, monkeypatch):
    cards = []
    monkeypatch.setattr(audit, "add_measurements", lambda name, found: cards.append(name) or True)
    finish_run(folder / "unlearned", RunRecord("unlearning", "r"), model=tiny_llama(1), tokenizer=byte_tokenizer())
    data = []
    for name in ("forget", "retain", "holdout"):
        rows = [{**row, "question": f"{name}: {row['question']}"} for row in QUESTIONS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data += [f"--{name}_data", folder / f"{name}.jsonl"]
    run("audit", "--unlearned", folder / "unlearned", "--original", folder / "base", *data, "--template", "plain",
        "--attacks", "plain_question", "--membership", "loss_attack", "--max_new_tokens", 3, "--output_dir",
        folder / "audit")  # fmt: skip
    assert cards == [str(folder / "unlearned")]
    found = reproduce(str(folder / "audit"), search=[str(folder)])
    assert found.verdict == "equal", found.text()
    assert len(found.metrics) > 4 and len(cards) == 1


def test_a_teacher_cache(folder):
    run("cache-teacher", folder / "base", folder / "rows.jsonl", folder / "cache", "--kind", "top", "--top", 8)
    assert str(folder) not in (folder / "cache" / RECORD_FILE).read_text()
    for path in (folder / "cache").glob("*.json"):
        assert str(folder) not in path.read_text(), path
    found = reproduce(str(folder / "cache"), search=[str(folder)])
    assert found.verdict == "equal" and found.by == "bytes" and len(found.files) == 2, found.text()
    (folder / "more.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    run("cache-teacher", folder / "base", folder / "more.jsonl", folder / "cache", "--kind", "top", "--top", 8)
    with pytest.raises(ValueError, match="came from several runs"):
        reproduce(str(folder / "cache"), search=[str(folder)])


@pytest.mark.parametrize("rank", [None, 4])
def test_forget_requests(folder, rank):
    store = folder / "store"
    base = str(folder / "base")
    for name, adapter in (("one", "lora"), ("two", "lora2"), ("three", "lora")):
        add_request(store, name, base=base, adapter=folder / adapter, forget=QUESTIONS)
    add_request(store, "four", base=base, method="magnitude_pruning", options={"share": 0.1},
                forget=QUESTIONS, retain=QUESTIONS)  # fmt: skip
    revoke_request(store, "three")
    report = apply_requests(store, folder / "out", lora_rank=rank)
    assert report.requests == ["one", "two", "four"]
    record = read_record(folder / "out")
    assert [item.role for item in record.inputs] == ["base", "request", "request", "request"]
    assert record.inputs[3].record.config["method"] == "magnitude_pruning"
    assert str(folder) not in (folder / "out" / RECORD_FILE).read_text()
    found = reproduce(str(folder / "out"), search=[str(folder)])
    assert found.verdict == "equal" and found.by == "bytes", found.text()
    shutil.rmtree(store)
    with pytest.raises(FileNotFoundError, match="no searched folder holds files of these digests"):
        reproduce(str(folder / "out"), search=[str(folder / "base")])


def test_forget_requests_that_share_a_fit(folder):
    store = folder / "store"
    how = {"method": "acu", "forget": QUESTIONS[:1]}
    add_request(store, "one", base=str(folder / "base"), **how, retain=QUESTIONS[1:])
    apply_requests(store, folder / "out")
    assert str(folder) not in (folder / "out" / RECORD_FILE).read_text()
    found = reproduce(str(folder / "out"), search=[str(folder)])
    assert found.verdict == "equal" and found.by == "bytes", found.text()


@pytest.mark.slow
def test_a_transfer_by_training_with_its_comparison(folder):
    settings = {"rows": 2, "shown": 1, "seeds": 2, "input_tokens": 4, "answer_tokens": 3, "rank": 2, "epochs": 1.0,
                "discriminator_epochs": 0.1, "attempts_per_row": 50, "batch_size": 2}  # fmt: skip
    made = TransLoraSettings(**settings)
    inputs = [f"What is {n}?" for n in range(12)]
    train_discriminator(tiny_llama(), byte_tokenizer(), inputs, folder / "seeds", made)
    shutil.copyfile(folder / "seeds" / "transfer_seeds.json", folder / "lora" / "transfer_seeds.json")
    run("transfer", folder / "lora", folder / "other", folder / "out", "--method", "trans_lora", "--settings",
        json.dumps(settings), "--discriminator", "none", "--template", "plain", "--test-data",
        folder / "rows.jsonl")  # fmt: skip
    assert str(folder) not in (folder / "out" / RECORD_FILE).read_text()
    found = reproduce(str(folder / "out"), search=[str(folder)])
    assert found.by == "measurements" and found.verdict in ("equal", "within intervals"), found.text()
    assert any(name == "accuracy" for name, *_ in found.metrics)


def test_a_closed_form_that_reads_texts(folder):
    texts = [{"text": f"{n} is a metal, and so on for a while"} for n in ("gold", "iron", "tin", "lead")]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    run("transfer", folder / "lora", folder / "other", folder / "out", "--method", "ridge", "--texts",
        folder / "texts.jsonl")  # fmt: skip
    found = reproduce(str(folder / "out"), search=[str(folder)])
    assert found.verdict == "equal", found.text()


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"recipe": "hf-transfer-ext quickstart"}, "a quickstart is a chain of jobs. Reproduce the results"),
        ({"recipe": "hf-transfer-ext unlearn", "job": "fine-tuning"}, "made on its way"),
        ({"recipe": "UnlearningTrainer"}, "'UnlearningTrainer' was called from Python"),
        ({"call": {}}, "its data were Python objects"),
        ({"call": {"base": "input:0", "artifacts": ["/etc"]}}, "`artifacts` in the call of the record names '"),
    ],
)
def test_what_cannot_be_repeated_is_refused_with_its_reason(folder, fields, reason):
    add_request(folder / "store", "one", base=str(folder / "base"), adapter=folder / "lora", forget=QUESTIONS)
    apply_requests(folder / "store", folder / "out")
    path = folder / "out" / RECORD_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=reason):
        reproduce(str(folder / "out"))
