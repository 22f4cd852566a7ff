import json

import pytest
import torch
from edits.edited_models import RETAIN, same_bytes, subject_of, write_adapter, write_base
from merging.tiny_models import load
from peft import PeftModel
from tiny import tiny_llama

from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.edits.subject import mean_loss

TOKENS = torch.arange(12).reshape(2, 6)


def test_every_weight_goes_the_other_way(tmp_path):
    base, tuned = write_base(tmp_path / "base"), write_base(tmp_path / "tuned", seed=5)
    report = apply_edit(base, tmp_path / "out", method="negation", tuned=tuned, options={"strength": 0.5})
    one, other, found = load(base), load(tuned), load(tmp_path / "out")
    for name in one:
        start, end = one[name].double(), other[name].double()
        torch.testing.assert_close(found[name].double(), start - 0.5 * (end - start), rtol=0, atol=1e-6)
    assert set(report.tensors) == set(one)


def test_an_example_by_hand(tmp_path):
    base, tuned = write_base(tmp_path / "base"), write_base(tmp_path / "tuned")
    changed = tiny_llama()
    with torch.no_grad():
        tiny = tiny_llama()
        tiny.model.norm.weight.fill_(1.0)
        changed.model.norm.weight.fill_(1.25)
    tiny.save_pretrained(base)
    changed.save_pretrained(tuned)
    apply_edit(base, tmp_path / "out", method="negation", tuned=tuned, options={"strength": 2})
    found = load(tmp_path / "out")
    assert torch.equal(found.pop("model.norm.weight"), torch.full((32,), 0.5))  # 1 - 2 (1.25 - 1)
    start = load(base)
    assert all(torch.equal(found[name], start[name]) for name in found)


def test_strength_0_leaves_every_byte(tmp_path):
    base, tuned = write_base(tmp_path / "base"), write_base(tmp_path / "tuned", seed=5)
    apply_edit(base, tmp_path / "out", method="negation", tuned=tuned, options={"strength": 0})
    assert same_bytes(base, tmp_path / "out")


def test_a_negated_adapter_undoes_the_adapter(tmp_path):
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", base)
    report = apply_edit(base, tmp_path / "out", method="negation", tuned=adapter, lora_rank=2)
    assert report.adapter is not None and report.adapter.residual_energy < 1e-10
    own = PeftModel.from_pretrained(tiny_llama(), adapter).merge_and_unload()
    negated = PeftModel.from_pretrained(own, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(negated(TOKENS).logits, tiny_llama()(TOKENS).logits, rtol=1e-4, atol=1e-4)


def taught(folder, base: str) -> str:
    """The model of `write_base` after some steps on the retain rows, so that negation raises their loss."""
    write_base(folder)
    model, answers = tiny_llama(), subject_of(base, retain_rows=RETAIN).retain
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        for answer in answers:
            ids = torch.tensor([answer.input_ids])
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    return str(folder)


def test_the_bound_on_the_retain_loss_holds(tmp_path):
    base = write_base(tmp_path / "base")
    common = {"method": "negation", "tuned": taught(tmp_path / "tuned", base), "retain": RETAIN}
    free = apply_edit(base, tmp_path / "free", **common, options={"strength": 4}, retain_bound=1e9)
    assert free.options["strength"] == 4
    found = apply_edit(base, tmp_path / "out", **common, options={"strength": 4}, retain_bound=0.2)
    assert 0 < found.options["strength"] < 4
    measured = {m["name"]: m["value"] for m in json.loads(record_of(tmp_path / "out").read_text())["metrics"]}
    subject = subject_of(str(tmp_path / "out"), retain_rows=RETAIN)
    assert mean_loss(subject.live, subject.retain, 0) == pytest.approx(measured["retain_loss"], abs=1e-4)
    assert 0.1 < measured["retain_loss"] - measured["retain_loss_before"] <= 0.2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no trial is left


def test_no_strength_within_the_bound_changes_nothing(tmp_path):
    base = write_base(tmp_path / "base")
    options = {"method": "negation", "tuned": taught(tmp_path / "tuned", base), "retain": RETAIN}
    found = apply_edit(base, tmp_path / "out", **options, options={"strength": 1000.0}, retain_bound=0.0)
    assert found.options["strength"] == 0 and same_bytes(base, tmp_path / "out")


def record_of(folder):
    return folder / "hf_transfer_ext.json"


def test_the_fine_tune_is_required(tmp_path):
    base = write_base(tmp_path / "base")
    with pytest.raises(ValueError, match="`negation` needs the fine-tune"):
        apply_edit(base, tmp_path / "out", method="negation")
    with pytest.raises(ValueError, match="'strength' of `negation` has to be at least 0"):
        apply_edit(base, tmp_path / "out", method="negation", tuned=base, options={"strength": -1})
    assert not (tmp_path / "out").exists()
