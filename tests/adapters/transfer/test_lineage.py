"""Bases with and without a common origin, and what may be transferred between them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters import distance as module
from hf_transfer_ext.adapters.transfer.lineage import lineage
from hf_transfer_ext.adapters.transfer.run import transfer_lora
from hf_transfer_ext.students.inits.uniform_depth import uniform_depth
from hf_transfer_ext.students.shape import StudentShape


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return save(tiny_llama(), tmp_path / "base")


def further_trained(share):
    """The base with every matrix moved by this share of its norm."""
    model = tiny_llama()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.dim() == 2:
                step = torch.randn_like(weight)
                weight += share * step * weight.norm() / step.norm()
    return model


def test_the_same_base(base, tmp_path):
    found = lineage(base, save(tiny_llama(), tmp_path / "again"))
    assert (found.relation, found.recommended, found.shared_tokens) == ("same", "none", 1.0)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert found.distances == dict.fromkeys(kinds, 0.0) and not found.refused
    assert "fits as it is" in " ".join(found.reasons)


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_a_base_that_was_trained_further(base, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    found = lineage(base, save(further_trained(0.125), tmp_path / "further"))
    assert (found.relation, found.recommended) == ("related", "copy")
    for distance in found.distances.values():
        assert distance == pytest.approx(0.125, rel=1e-4)


def test_an_unrelated_base_of_equal_shapes(base, tmp_path):
    found = lineage(base, save(tiny_llama(seed=3), tmp_path / "other"))
    assert (found.relation, found.recommended) == ("unrelated", "trans_lora")
    for distance in found.distances.values():
        assert distance == pytest.approx(math.sqrt(2), rel=0.1)
    for method in ("copy", "project"):
        with pytest.raises(ValueError, match=r"no common origin .* Use trans_lora"):
            found.require(method)
    found.require("cross_lora")
    assert "logits" in found.reasons[-1]


def test_other_shapes(base, tmp_path):
    found = lineage(base, save(tiny_llama(intermediate_size=80), tmp_path / "wide"))
    assert (found.relation, found.recommended) == ("other shapes", "trans_lora")
    assert found.shapes["down_proj"] == ((32, 64), (32, 80)) and set(found.distances) == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    with pytest.raises(ValueError, match="different shapes"):
        found.require("copy")


def test_a_student_with_fewer_layers_is_related(tmp_path):
    teacher = tiny_llama(num_hidden_layers=4)
    student = uniform_depth(teacher, StudentShape(depth=3))
    found = lineage(save(teacher, tmp_path / "teacher"), save(student, tmp_path / "student"))
    assert (found.relation, found.recommended, found.depths) == ("related", "trans_lora", (4, 3))
    assert set(found.distances.values()) == {0.0}
    found.require("copy")


def test_another_vocabulary(base, tmp_path):
    other = save(tiny_llama(seed=3), tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    half = sorted(vocabulary, key=vocabulary.get)[:128]
    content["model"]["vocab"] = {f"#{t}" if t in half else t: i for t, i in vocabulary.items()}
    path.write_text(json.dumps(content))
    assert lineage(base, other).shared_tokens == pytest.approx(0.5)
    content["model"]["vocab"] = {f"#{t}": i for t, i in vocabulary.items()}
    path.write_text(json.dumps(content))
    found = lineage(base, other)
    assert found.shared_tokens == 0.0 and {"cross_lora", "lorasuite"} <= set(found.refused)
    path.unlink()
    (other / "tokenizer_config.json").unlink()
    assert lineage(base, other).shared_tokens is None


def test_a_copy_onto_an_unrelated_base_is_refused_unless_forced(base, tmp_path):
    other = save(tiny_llama(seed=3), tmp_path / "other")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "lora")
    options = {"method": "copy", "source_base": base}
    with pytest.raises(ValueError, match="no common origin"):
        transfer_lora(tmp_path / "lora", other, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert transfer_lora(tmp_path / "lora", other, tmp_path / "out", force=True, **options).modules
