import json

import pytest
import torch
from edits.edited_models import FORGET, RETAIN, has_card_and_record, same_bytes, write_adapter, write_base
from merging.tiny_models import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_transfer_ext.edits.apply import apply_edit, largest_within
from hf_transfer_ext.edits.method import EditMethod, edit_method
from hf_transfer_ext.edits.methods import EDITS
from hf_transfer_ext.edits.subject import data_digest
from hf_transfer_ext.merging.method import Interval
from hf_transfer_ext.registry import Registry

PRUNE = {"method": "wanda", "forget": FORGET, "retain": RETAIN, "options": {"share": 0.2}}


def test_the_result_is_a_whole_folder_that_says_what_was_done(tmp_path):
    base = write_base(tmp_path / "base")
    apply_edit(base, tmp_path / "out", **PRUNE)
    assert has_card_and_record(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "hf_transfer_ext.json").read_text())
    assert record["job"] == "unlearning" and record["config"]["method"] == "wanda"
    assert record["config"]["options"] == {"protect": 0.1, "share": 0.2}
    assert record["config"]["forget"] == {"rows": 2, "sha256": data_digest(FORGET)}
    assert record["inputs"][0]["role"] == "base" and record["inputs"][0]["sha256"]
    texts = [path.read_text() for path in (tmp_path / "out").glob("*") if path.suffix in (".json", ".md")]
    assert not any("Ada lives" in text for text in texts)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]


def test_the_result_does_not_depend_on_threads_or_on_where_rows_come_from(tmp_path):
    base = write_base(tmp_path / "base")
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORGET))
    apply_edit(base, tmp_path / "one", **PRUNE, threads=1)
    apply_edit(base, tmp_path / "two", **{**PRUNE, "forget": tmp_path / "forget.jsonl"}, threads=3)
    assert same_bytes(tmp_path / "one", tmp_path / "two")
    digests = [json.loads((tmp_path / name / "hf_transfer_ext.json").read_text())["config"]["forget"]
               for name in ("one", "two")]  # fmt: skip
    assert digests[0] == digests[1]


def test_bfloat16_stays_and_what_is_not_edited_keeps_its_bytes(tmp_path):
    base = write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    apply_edit(base, tmp_path / "out", **PRUNE)
    start, found = load(base), load(tmp_path / "out")
    for name in start:
        assert found[name].dtype == torch.bfloat16
        stays = found[name] != 0
        assert torch.equal(found[name][stays], start[name][stays])


def test_the_change_as_a_lora_of_full_rank_is_the_model(tmp_path):
    base = write_base(tmp_path / "base")
    apply_edit(base, tmp_path / "model", **PRUNE)
    report = apply_edit(base, tmp_path / "lora", **PRUNE, lora_rank=32)
    assert report.adapter is not None and has_card_and_record(tmp_path / "lora")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    found = dict(merged.merge_and_unload().state_dict())
    for name, tensor in load(tmp_path / "model").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_an_existing_result_is_replaced_only_if_asked(tmp_path):
    base = write_base(tmp_path / "base")
    apply_edit(base, tmp_path / "out", **PRUNE)
    with pytest.raises(FileExistsError, match="already holds a result"):
        apply_edit(base, tmp_path / "out", **PRUNE)
    apply_edit(base, tmp_path / "out", **{**PRUNE, "options": {"share": 0}}, overwrite=True)
    assert same_bytes(base, tmp_path / "out")
    with pytest.raises(ValueError, match="holds the input"):
        apply_edit(base, base, **PRUNE, overwrite=True)


def test_nothing_is_left_of_an_edit_that_fails(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base")
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("hf_transfer_ext.edits.apply.finish_run", full)
    with pytest.raises(OSError, match="disk full"):
        apply_edit(base, tmp_path / "out", **PRUNE)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_model_with_nan_is_refused(tmp_path):
    base = write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(base)
    other = write_base(tmp_path / "tuned", seed=3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        apply_edit(base, tmp_path / "out", method="negation", tuned=other)


def test_mistakes_are_answered_before_any_work(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", base)
    for changes, message in (
        ({"method": "wnada"}, "Did you mean 'wanda'"),
        ({"retain_bound": 0.1}, "`wanda` has not"),
        ({"lora_rank": 0}, "`lora_rank` has to be at least 1"),
        ({"tuned": base}, "does not read the fine-tune"),
        ({"options": {"share": True}}, "between 0 and 1, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_edit(base, tmp_path / "out", **{**PRUNE, **changes})
    with pytest.raises(ValueError, match="is an adapter on a model"):
        apply_edit(adapter, tmp_path / "out", **PRUNE)
    with pytest.raises(ValueError, match="`retain_bound` has to be at least 0"):
        apply_edit(base, tmp_path / "out", method="negation", tuned=adapter, retain=RETAIN, retain_bound=-1.0)
    with pytest.raises(ValueError, match="give `retain`"):
        apply_edit(base, tmp_path / "out", method="negation", tuned=adapter, retain_bound=1.0)
    with pytest.raises(ValueError, match="Nothing changes"):
        apply_edit(base, tmp_path / "out", method="negation", tuned=adapter, options={"strength": 0}, lora_rank=1)


def test_the_largest_strength_within_a_bound():
    tried = []

    def rise(strength):
        tried.append(strength)
        return strength**2

    assert largest_within(rise, 2.0, 5.0) == 2.0 and tried == [2.0]
    found = largest_within(rise, 2.0, 1.0, trials=10)
    assert found <= 1.0 and found == pytest.approx(1.0, abs=2 / 2**10)
    assert largest_within(lambda strength: 1.0, 2.0, 0.5) == 0.0


def test_only_declared_methods_are_registered():
    registry = Registry("edit", check=EDITS._check)
    with pytest.raises(ValueError, match="is not of the kind edit method"):
        registry.register(lambda subject: None)
    with pytest.raises(ValueError, match="need of an edit method"):
        edit_method(needs=("forgte",))(lambda subject: None)
    with pytest.raises(ValueError, match="is not one of its options"):
        edit_method(ranges={"x": Interval(0)})(lambda subject: None)
    assert all(isinstance(one, EditMethod) for _, one in EDITS.items())
