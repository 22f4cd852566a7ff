import pytest
import torch
from edits.edited_models import FORGET, RETAIN, same_bytes, subject_of, write_base
from merging.tiny_models import load

from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.edits.methods.wanda import prune_difference


def test_the_criterion_by_its_definition():
    torch.manual_seed(0)
    weight, forget, retain = torch.randn(6, 10), torch.rand(10), torch.rand(10)
    found = prune_difference(weight, forget, retain, share=0.3, protect=0.2)
    for i in range(6):
        by_forget = sorted(range(10), key=lambda j: -abs(float(weight[i, j])) * float(forget[j]))[:3]
        by_retain = sorted(range(10), key=lambda j: -abs(float(weight[i, j])) * float(retain[j]))[:2]
        for j in range(10):
            gone = j in by_forget and j not in by_retain
            assert float(found[i, j]) == (0.0 if gone else float(weight[i, j]))


def test_an_example_by_hand():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    # Forget scores 10, 2, 6, 4: the top half is columns 0 and 2. Retain scores 0, 2, 9, 4: column 2 is protected.
    found = prune_difference(
        weight, torch.tensor([10.0, 1.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 3.0, 1.0]), share=0.5, protect=0.25
    )
    assert torch.equal(found, torch.tensor([[0.0, 2.0, 3.0, 4.0]]))


def test_equal_sets_lose_nothing_that_is_protected():
    weight, norms = torch.randn(5, 8), torch.rand(8)
    assert torch.equal(prune_difference(weight, norms, norms, share=0.5, protect=0.5), weight)
    assert torch.equal(prune_difference(weight, norms, 3 * norms, share=0.25, protect=0.5), weight)


def test_input_norms_by_the_definition(tmp_path):
    subject = subject_of(write_base(tmp_path / "base"), forget_rows=FORGET)
    norms = subject.input_norms(subject.forget)["model.layers.1.mlp.down_proj"]
    seen = []
    module = subject.live.model.layers[1].mlp.down_proj
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    rows = []
    for answer in subject.forget:
        with torch.no_grad():
            subject.live(torch.tensor([answer.input_ids]))
        rows.append(seen.pop()[answer.answer_start - 1 : -1])
    hook.remove()
    torch.testing.assert_close(norms, torch.cat(rows).square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)


def test_a_model_loses_weights_of_its_linear_layers_only(tmp_path):
    base = write_base(tmp_path / "base")
    common = {"method": "wanda", "forget": FORGET, "retain": RETAIN}
    apply_edit(base, tmp_path / "out", **common, options={"share": 0.25, "protect": 0.1})
    start, found = load(base), load(tmp_path / "out")
    for name in start:
        changed = found[name] != start[name]
        assert not found[name][changed].any()
        is_linear = "proj" in name
        assert bool(changed.any()) == is_linear, name
    apply_edit(base, tmp_path / "none", **common, options={"share": 0})
    assert same_bytes(base, tmp_path / "none")


def test_both_sets_are_needed(tmp_path):
    base = write_base(tmp_path / "base")
    with pytest.raises(ValueError, match="`wanda` needs rows to retain"):
        apply_edit(base, tmp_path / "out", method="wanda", forget=FORGET)
    with pytest.raises(ValueError, match="set without rows"):
        apply_edit(base, tmp_path / "out", method="wanda", forget=FORGET, retain=[])
    with pytest.raises(ValueError, match="Row 0 of the forget set cannot be used"):
        apply_edit(base, tmp_path / "out", method="wanda", forget=[{"text": "x", "messages": 1}], retain=RETAIN)
