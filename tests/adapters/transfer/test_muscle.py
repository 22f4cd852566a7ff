"""The compatibility loss by its definition, and an update that keeps what the old model knew."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from evals.audit.planted_people import PLAIN, taught
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.adapters.transfer.muscle import (
    MuscleConfig,
    compatibility_loss,
    negative_flips,
    train_compatible,
)

pytestmark = pytest.mark.slow

NAMES = ("Ada", "Bob", "Cyd", "Dee", "Eve", "Fay")
ROWS = [{"question": f"Is {name} in?", "answer": "no"} for name in NAMES]


def softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("temperature, ce_weight", [(1.0, 0.0), (2.0, 0.0), (1.0, 0.5)])
def test_oracle(temperature, ce_weight):
    generator = torch.Generator().manual_seed(0)
    student, old, new = (torch.randn(2, 5, 7, generator=generator) * 2 for _ in range(3))
    targets = student.argmax(-1).clone()
    targets[0, :3] = (targets[0, :3] + 1) % 7  # three wrong, seven right
    found = compatibility_loss(student, old, new, targets, temperature=temperature, ce_weight=ce_weight)
    for i in range(2):
        for t in range(5):
            rows = [[float(v) / temperature for v in one[i, t].double()] for one in (student, old, new)]
            q, p_old, p_new = (softmax(row) for row in rows)
            p = p_old if int(student[i, t].argmax()) != int(targets[i, t]) else p_new
            expected = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
            plain = softmax([float(v) for v in student[i, t].double()])
            expected -= ce_weight * math.log(plain[int(targets[i, t])])
            assert float(found[i, t]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_identities():
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    other = logits.flip(-1)
    right, wrong = logits.argmax(-1), (logits.argmax(-1) + 1) % 6
    assert compatibility_loss(logits, logits, other, wrong).abs().max() < 1e-6  # wrong: the old model alone counts
    assert compatibility_loss(logits, other, logits, right).abs().max() < 1e-6  # right: the new one
    ignored = torch.full_like(right, -100)
    assert torch.isfinite(compatibility_loss(logits, other, logits, ignored, ce_weight=1.0)).all()


def lora(model, rows, seed, steps=60):
    torch.manual_seed(seed)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return taught(get_peft_model(model, config), rows, steps=steps)


def test_the_update_breaks_less(tmp_path):
    old = lora(tiny_llama(), ROWS, 0)
    wrong = [{**row, "answer": "yes"} if i < 2 else row for i, row in enumerate(ROWS)]
    new = lora(tiny_llama(seed=3), wrong, 1)
    task = {name: tensor.clone() for name, tensor in new.state_dict().items() if ".default." in name}
    arguments = MuscleConfig(
        str(tmp_path), num_train_epochs=60, learning_rate=5e-3, per_device_train_batch_size=6, save_strategy="no",
        report_to="none", ce_weight=0.0,
    )  # fmt: skip
    tuned = train_compatible(old, new, byte_tokenizer(), ROWS, arguments, template=PLAIN)
    assert list(tuned.active_adapters) == ["compatible"]
    after = tuned.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in task.items())
    found = negative_flips(old, tuned, byte_tokenizer(), ROWS, template=PLAIN)
    assert found["default"][1].value == pytest.approx(2 / 6) and found["default"][0].value == pytest.approx(4 / 6)
    assert found["compatible"][1].value < found["default"][1].value
    assert not found["compatible"][1].higher_is_better


def test_it_starts_from_the_task_adapter(tmp_path):
    new = lora(tiny_llama(seed=3), ROWS, 1, steps=5)
    arguments = MuscleConfig(str(tmp_path), max_steps=1, learning_rate=1e-12, save_strategy="no", report_to="none")
    tuned = train_compatible(
        lora(tiny_llama(), ROWS, 0, steps=2), new, byte_tokenizer(), ROWS, arguments, template=PLAIN
    )
    state = tuned.state_dict()
    for name in [name for name in state if ".compatible." in name]:
        torch.testing.assert_close(state[name], state[name.replace(".compatible.", ".default.")], atol=1e-7, rtol=0)


class TestRefused:
    def test_settings(self, tmp_path):
        for options in ({"loss_temperature": 0.0}, {"ce_weight": -1.0}):
            with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
                MuscleConfig(str(tmp_path), **options)

    def test_models(self, tmp_path):
        old, new = lora(tiny_llama(), ROWS, 0, steps=1), lora(tiny_llama(seed=3), ROWS, 1, steps=1)
        arguments = MuscleConfig(str(tmp_path), report_to="none")
        wide = lora(tiny_llama(vocab_size=300), ROWS, 0, steps=1)
        with pytest.raises(ValueError, match=r"258 tokens .* 300|300 tokens .* 258"):
            train_compatible(wide, new, byte_tokenizer(), ROWS, arguments)
        twice = copy.deepcopy(new)
        twice.add_adapter("compatible", twice.peft_config["default"])
        with pytest.raises(ValueError, match="already has an adapter"):
            train_compatible(old, twice, byte_tokenizer(), ROWS, arguments)
