import json

import pytest
import torch
from edits.edited_models import FORGET, RETAIN, has_card_and_record, same_bytes, write_adapter, write_base
from merging.tiny_models import load
from peft import PeftModel
from tiny import tiny_llama

from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.edits.requests import (
    add_request,
    apply_requests,
    list_requests,
    main,
    revoke_request,
    stacked,
)
from hf_transfer_ext.edits.subject import data_digest
from hf_transfer_ext.settings import run_program

WANDA = {"method": "wanda", "retain": RETAIN, "options": {"share": 0.2}}


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def files_of(store):
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())


def test_a_stack_is_the_sum_of_the_changes(tmp_path, base):
    adapters = [write_adapter(tmp_path / f"lora{i}", base, seed=i) for i in (1, 2)]
    for i, adapter in enumerate(adapters):
        add_request(tmp_path / "store", f"r{i}", base=base, adapter=adapter, forget=FORGET[i : i + 1])
    report = apply_requests(tmp_path / "store", tmp_path / "out")
    assert report.requests == ["r0", "r1"] and has_card_and_record(tmp_path / "out")
    start, found = load(base), load(tmp_path / "out")
    merged = [PeftModel.from_pretrained(tiny_llama(), adapter).merge_and_unload().state_dict() for adapter in adapters]
    for name in start:
        expected = start[name].double() + sum(one[name].double() - start[name].double() for one in merged)
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-5)
    assert set(report.tensors) == {name for name in start if not torch.equal(start[name], found[name])}


def test_revoking_in_the_middle_is_never_having_added(tmp_path, base):
    adapters = [write_adapter(tmp_path / f"lora{i}", base, seed=i, targets=("q_proj", "down_proj")) for i in (1, 3)]

    def add(store, *names):
        for name in names:
            if name == "edit":
                add_request(store, name, base=base, forget=FORGET, **WANDA)
            else:
                add_request(store, name, base=base, adapter=adapters[int(name[-1])], forget=FORGET)

    add(tmp_path / "with", "a0", "edit", "a1")
    revoke_request(tmp_path / "with", "edit")
    add(tmp_path / "without", "a0", "a1")
    add(tmp_path / "other", "edit", "a0", "a1")
    revoke_request(tmp_path / "other", "a0")
    add(tmp_path / "edit_a1", "edit", "a1")
    for store in ("with", "without", "other", "edit_a1"):
        apply_requests(tmp_path / store, tmp_path / f"{store}_out")
    assert same_bytes(tmp_path / "with_out", tmp_path / "without_out")
    assert same_bytes(tmp_path / "other_out", tmp_path / "edit_a1_out")
    assert not same_bytes(tmp_path / "with_out", tmp_path / "other_out")
    assert not [one for one in files_of(tmp_path / "with") if "edit-" in one]


def test_without_a_standing_request_the_base_comes_back(tmp_path, base):
    add_request(tmp_path / "store", "r", base=base, forget=FORGET, **WANDA)
    apply_requests(tmp_path / "store", tmp_path / "one")
    assert not same_bytes(base, tmp_path / "one")
    revoke_request(tmp_path / "store", "r")
    report = apply_requests(tmp_path / "store", tmp_path / "none")
    assert same_bytes(base, tmp_path / "none") and report.tensors == [] and report.requests == []


def test_one_edit_alone_is_the_edit(tmp_path, base):
    add_request(tmp_path / "store", "r", base=base, forget=FORGET, **WANDA)
    apply_requests(tmp_path / "store", tmp_path / "out")
    apply_edit(base, tmp_path / "direct", forget=FORGET, **WANDA)
    assert same_bytes(tmp_path / "direct", tmp_path / "out")


def test_weights_that_several_requests_prune_are_zero(tmp_path, base):
    add_request(tmp_path / "store", "one", base=base, forget=FORGET, **WANDA)
    add_request(tmp_path / "store", "two", forget=FORGET, **WANDA)  # the same edit again
    apply_requests(tmp_path / "store", tmp_path / "both")
    revoke_request(tmp_path / "store", "two")
    apply_requests(tmp_path / "store", tmp_path / "single")
    assert same_bytes(tmp_path / "both", tmp_path / "single")


def test_the_stack_by_hand():
    base = torch.tensor([1.0, 2.0, 3.0, 0.0])
    models = [torch.tensor([0.0, 2.5, 3.0, 1.0]), torch.tensor([0.0, 2.0, 2.0, 0.0])]
    assert torch.equal(stacked(base, models), torch.tensor([0.0, 2.5, 2.0, 1.0]))


def test_adapters_stack_into_an_adapter(tmp_path, base):
    for i in (1, 2):
        adapter = write_adapter(tmp_path / f"lora{i}", base, seed=i)
        add_request(tmp_path / "store", f"r{i}", base=base, adapter=adapter, forget=FORGET)
    report = apply_requests(tmp_path / "store", tmp_path / "lora", lora_rank=4)
    assert report.adapter is not None and report.adapter.residual_energy < 1e-8
    apply_requests(tmp_path / "store", tmp_path / "model")
    merged = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "model").items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5)


def test_the_state_says_what_was_asked_when_and_never_the_data(tmp_path, base):
    store = tmp_path / "store"
    add_request(store, "people", base=base, forget=FORGET, **WANDA)
    add_request(store, "words", method="concept_ablation", options={"words": ["Qx"], "count": 1})
    revoke_request(store, "people")
    state = json.loads((store / "requests.json").read_text())
    people, words = state["requests"]
    assert people["data_sha256"] == data_digest(FORGET) and people["rows"] == 2 and people["method"] == "wanda"
    assert people["added"] <= people["revoked"] and words["revoked"] is None
    assert words["data_sha256"] == data_digest([{"words": ["Qx"]}])
    apply_requests(store, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "hf_transfer_ext.json").read_text())
    assert [one["name"] for one in record["config"]["requests"]] == ["people", "words"]
    for folder in (store, tmp_path / "out"):
        texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md")]
        assert texts and not any("Ada lives" in text or '"Qx"' in text for text in texts)


def test_a_revoked_name_is_free_again(tmp_path, base):
    store = tmp_path / "store"
    add_request(store, "r", base=base, forget=FORGET, **WANDA)
    with pytest.raises(ValueError, match="There is a request 'r' already"):
        add_request(store, "r", forget=FORGET, **WANDA)
    revoke_request(store, "r")
    add_request(store, "r", forget=FORGET[:1], **WANDA)
    assert [(one.name, one.revoked is None) for one in list_requests(store)] == [("r", False), ("r", True)]
    with pytest.raises(ValueError, match=r"Unknown request 'R'. .*Available: r"):
        revoke_request(store, "R")


def test_a_request_that_fails_leaves_the_requests_as_they_were(tmp_path, base):
    store = tmp_path / "store"
    with pytest.raises(ValueError, match="Did you mean 'wanda'"):
        add_request(store, "r", base=base, forget=FORGET, method="wnda")
    assert not store.exists()
    add_request(store, "r", base=base, forget=FORGET, **WANDA)
    before = files_of(store)
    other = write_base(tmp_path / "other", hidden_size=16)
    bad = write_adapter(tmp_path / "bad", other)
    for settings, message in (
        ({"method": "wanda", "forget": FORGET}, "needs rows to retain"),
        ({"method": "acu", "forget": FORGET, "retain": RETAIN}, "cannot stand together"),
        ({"adapter": bad}, "`forget` is needed"),
        ({"adapter": bad, "forget": FORGET, "retain": RETAIN}, "`retain` belongs to an edit"),
        ({"forget": FORGET}, "needs an `adapter`, or the `method`"),
        ({"base": other, "forget": FORGET, **WANDA}, "are over"),
    ):
        with pytest.raises(ValueError, match=message):
            add_request(store, "s", **settings)
    with pytest.raises(ValueError, match="made of up to 100 letters"):
        add_request(store, "../s", forget=FORGET, **WANDA)
    assert files_of(store) == before


def test_a_changed_base_or_artifact_is_refused(tmp_path, base):
    store = tmp_path / "store"
    request = add_request(store, "r", base=base, forget=FORGET, **WANDA)
    file = store / request.artifact / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="files of request 'r'"):
        apply_requests(store, tmp_path / "out")
    file.write_bytes(content)
    write_base(tmp_path / "base", seed=4)
    with pytest.raises(ValueError, match="weights of the base"):
        apply_requests(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_that_leads_out_of_its_folder_is_refused(tmp_path, base):
    store = tmp_path / "store"
    add_request(store, "r", base=base, forget=FORGET, **WANDA)
    path = store / "requests.json"
    state = json.loads(path.read_text())
    state["requests"][0]["artifact"] = "../base"
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="leads out of its folder"):
        revoke_request(store, "r")
    path.write_text(json.dumps({**state, "schema_version": 3}))
    with pytest.raises(ValueError, match="schema version 3"):
        list_requests(store)
    path.write_text("[]")
    with pytest.raises(ValueError):
        list_requests(store)
    with pytest.raises(FileNotFoundError, match="There are no requests"):
        apply_requests(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "nothing").exists()


def test_the_command_line(tmp_path, base, capsys):
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORGET))
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RETAIN))
    store, out = str(tmp_path / "store"), str(tmp_path / "out")

    def run(*words):
        return run_program("hf-transfer-ext requests", main, words)

    data = ("--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl"))
    assert run("add", store, "r", "--base", base, "--method", "wanda", "--options", "{share: 0.1}", *data) == 0
    assert run("list", store) == 0 and run("apply", store, out) == 0 and run("revoke", store, "r") == 0
    printed = capsys.readouterr().out
    assert data_digest(FORGET)[:12] in printed and "14 tensors changed" in printed
    assert run("appyl", store) == 2 and "Did you mean 'apply'" in capsys.readouterr().err
    assert run() == 0 and "add|list|revoke|apply" in capsys.readouterr().out
