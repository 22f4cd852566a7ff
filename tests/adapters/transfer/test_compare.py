"""What a transfer kept, next to its controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evals.audit.planted_people import PLAIN, taught
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.compare import (
    SOURCE_ADAPTED,
    SOURCE_BASE,
    TARGET_BASE,
    compare_transfer,
    random_like,
    random_of_same_norm,
    transfer_rows,
)
from hf_transfer_ext.adapters.transfer.method import LinearPair, product_norm
from hf_transfer_ext.adapters.transfer.run import transfer_lora
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings
from hf_transfer_ext.weights.lora import LoraFactors

ROWS = [{"question": f"Is {name} in?", "answer": "no way"} for name in ("Ada", "Bob", "Cyd", "Dee", "Eve", "Fay")]
SETTINGS = TransLoraSettings(
    rank=4, epochs=30.0, learning_rate=2e-2, target_modules=("q_proj", "v_proj", "down_proj"), batch_size=6
)


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_the_controls_are_measured_beside_the_transfer(tmp_path):
    source, target = save(tiny_llama(), tmp_path / "source"), save(tiny_llama(), tmp_path / "target")
    config = LoraConfig(r=4, target_modules=list(SETTINGS.target_modules), task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_llama(), config)
    taught(adapted, ROWS, steps=60).save_pretrained(tmp_path / "lora")
    transfer_lora(tmp_path / "lora", target, tmp_path / "moved", method="project", source_base=source)
    found = compare_transfer(
        source, tmp_path / "lora", target, {"project": tmp_path / "moved"}, ROWS, tmp_path / "work", true_rows=ROWS,
        settings=SETTINGS, template=PLAIN,
    )  # fmt: skip
    assert not found.not_measured
    rows = {row.name: row for row in found.rows()}
    assert list(rows) == [SOURCE_BASE, SOURCE_ADAPTED, TARGET_BASE, "copy", "random", "true data", "project"]
    assert rows[SOURCE_ADAPTED].accuracy.value == 1.0 and rows[TARGET_BASE].accuracy.value == 0.0
    assert rows["copy"].retention.value == 1.0 and rows["copy"].negative_flips.value == 0.0  # one base: the identity
    assert rows["random"].retention.value == 0.0 and rows["random"].negative_flips.value == 1.0
    assert rows["true data"].retention.value == 1.0
    assert rows[TARGET_BASE].retention is None


def test_what_cannot_be_measured_says_why(tmp_path):
    source, target = save(tiny_llama(), tmp_path / "source"), save(tiny_llama(hidden_size=48), tmp_path / "target")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "lora")
    right = iter([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    found = compare_transfer(
        source,
        tmp_path / "lora",
        target,
        {},
        ROWS,
        tmp_path / "work",
        score=lambda model, tokenizer: np.array(next(right)),
    )
    assert set(found.not_measured) == {"copy", "true data"} and "equal shapes" in found.not_measured["copy"]
    assert {row.name: row for row in found.rows()}["random"].retention.value == 1.0
    with pytest.raises(ValueError, match="'copy' is the name of a control"):
        compare_transfer(source, tmp_path / "lora", target, {"copy": "x"}, ROWS, tmp_path / "work")


def test_numbers_over_two_runs_by_hand():
    def run(*bits):
        names = (SOURCE_BASE, SOURCE_ADAPTED, TARGET_BASE, "moved")
        return {name: np.array([float(one) for one in own]) for name, own in zip(names, bits, strict=True)}

    runs = [run("0000", "1110", "1000", "1001"), run("0000", "1111", "1000", "1111")]
    row = transfer_rows(runs)[-1]
    # gains: source 3/4 and 4/4; target 1/4 and 3/4. flips: items 2 and 3 of the first run.
    assert row.retention.value == pytest.approx((1 / 3 + 3 / 4) / 2)
    assert row.accuracy.value == pytest.approx((2 / 4 + 1) / 2)
    assert row.negative_flips.value == pytest.approx((2 / 4 + 0) / 2)
    low, high = row.negative_flips.interval
    assert low <= row.negative_flips.value <= high
    with pytest.raises(ValueError, match="not a gain"):
        transfer_rows([run("1110", "0000", "0000", "0000")])


def test_random_factors_have_the_norm_of_what_they_stand_for():
    generator = torch.Generator().manual_seed(0)
    change = LoraFactors(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator))
    found = random_like(change, generator)
    assert found.left.shape == (6, 2) and product_norm(found) == pytest.approx(product_norm(change), rel=1e-5)
    assert product_norm(change) == pytest.approx(float((change.left @ change.right).norm()), rel=1e-5)
    cosine = ((found.left @ found.right) * (change.left @ change.right)).sum() / product_norm(change) ** 2
    assert abs(float(cosine)) < 0.9
    weights = torch.randn(6, 5, generator=generator), torch.randn(8, 7, generator=generator)
    pair = LinearPair("layers.0.q_proj", "layers.0.q_proj", *weights, change)
    one, again, other = (random_of_same_norm(pair, seed=seed) for seed in (0, 0, 1))
    assert one.shape == (8, 7) and torch.equal(one.left, again.left) and not torch.equal(one.left, other.left)
    relative = product_norm(one) / float(weights[1].norm())
    assert relative == pytest.approx(product_norm(change) / float(weights[0].norm()), rel=1e-5)
