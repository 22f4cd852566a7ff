import pytest
import torch
from edits.edited_models import FORGET, RETAIN, same_bytes, write_base
from merging.tiny_models import load

from hf_transfer_ext.edits.apply import apply_edit
from hf_transfer_ext.edits.methods.magnitude_pruning import FLOOR, forget_inputs, prune_largest


def test_the_criterion_by_its_definition():
    torch.manual_seed(0)
    weight, forget, retain = torch.randn(6, 10), torch.rand(10), torch.rand(10)
    ratios = [(float(f) + FLOOR) / (float(r) + FLOOR) for f, r in zip(forget, retain, strict=True)]
    chosen = [j for j in sorted(range(10), key=lambda j: -ratios[j])[:4] if ratios[j] > 1]
    columns = forget_inputs(forget, retain, 0.4)
    assert columns.nonzero().flatten().tolist() == sorted(chosen)
    found = prune_largest(weight, columns, share=0.5)
    places = [(i, j) for i in range(6) for j in sorted(chosen)]
    gone = sorted(places, key=lambda p: -abs(float(weight[p])))[: round(0.5 * len(places))]
    for i in range(6):
        for j in range(10):
            assert float(found[i, j]) == (0.0 if (i, j) in gone else float(weight[i, j]))


def test_an_example_by_hand():
    columns = forget_inputs(torch.tensor([4.0, 1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]), 0.5)
    assert columns.tolist() == [True, False, True, False]
    weight = torch.tensor([[1.0, 9.0, -5.0, 9.0], [-3.0, 9.0, 2.0, 9.0]])
    assert torch.equal(prune_largest(weight, columns, share=0.5), torch.tensor([[1.0, 9, 0, 9], [0, 9, 2, 9]]))
    assert torch.equal(prune_largest(weight, columns, share=1.0), torch.tensor([[0.0, 9, 0, 9], [0, 9, 0, 9]]))


def test_equal_sets_choose_nothing():
    norms = torch.rand(7)
    assert not forget_inputs(norms, norms, 1.0).any()
    assert not forget_inputs(torch.zeros(3), torch.zeros(3), 1.0).any()


def test_a_model_loses_columns(tmp_path):
    base = write_base(tmp_path / "base")
    common = {"method": "magnitude_pruning", "forget": FORGET, "retain": RETAIN}
    report = apply_edit(base, tmp_path / "out", **common, options={"inputs": 0.1})
    start, found = load(base), load(tmp_path / "out")
    for module, count in report.found["features"].items():
        name = f"{module}.weight"
        assert int((found[name] == 0).all(0).sum()) == count >= 1
    assert set(report.tensors) == {name for name in start if not torch.equal(start[name], found[name])}
    apply_edit(base, tmp_path / "none", **common, options={"share": 0})
    assert same_bytes(base, tmp_path / "none")


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="'inputs' of `magnitude_pruning` has to be between 0 and 1"):
        apply_edit("base", tmp_path / "out", method="magnitude_pruning", options={"inputs": 2})
