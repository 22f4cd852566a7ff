import copy

import pytest
import torch
from evals.audit.planted_people import DATA, FORGET, PLAIN, planted, subject
from tiny import byte_tokenizer

from hf_transfer_ext.data.forget_retain import ForgetRetainPairs, forget_retain_collator
from hf_transfer_ext.evals.audit.attacks.quantization import quantization
from hf_transfer_ext.evals.audit.weight_distance import weight_distance
from hf_transfer_ext.models.views import rounded


def hidden_within_rounding(model, rows, bits=4):
    """The model trained away from its answers, each weight held in the cell that rounds to the same level."""
    pairs = ForgetRetainPairs(rows, None, byte_tokenizer(), template=PLAIN)
    batch = forget_retain_collator(257)([pairs[i] for i in range(len(pairs))])["forget"]
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    cells = []
    for module in linears:
        level = rounded(module.weight.data, bits)
        padded = torch.nn.functional.pad(module.weight.data, (0, -module.weight.shape[1] % 64))
        largest = padded.reshape(len(padded), -1, 64).abs().amax(-1, keepdim=True)
        step = (largest / (2 ** (bits - 1) - 1)).expand(-1, -1, 64).reshape(len(padded), -1)
        step = step[:, : module.weight.shape[1]]
        free = 0.49 * step * (module.weight.data.abs() < 6.4 * step)  # the largest weight sets the step
        cells.append(
            (torch.minimum(level - free, module.weight.data), torch.maximum(level + free, module.weight.data))
        )
    for _ in range(60):
        model.zero_grad()
        model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss.backward()
        with torch.no_grad():
            for module, (low, high) in zip(linears, cells, strict=True):
                module.weight += 0.02 * module.weight.grad.sign()
                module.weight.copy_(module.weight.clamp(low, high))
    return model.eval()


def test_a_change_that_rounds_away_brings_everything_back():
    original = planted()[0]
    unlearned = hidden_within_rounding(copy.deepcopy(original), FORGET)
    plain = subject(original).probability(FORGET).mean()
    assert subject(unlearned).probability(FORGET).mean() < 0.5 * plain
    kept = quantization(subject(original), DATA, bits=4)
    assert quantization(subject(unlearned), DATA, bits=4) == pytest.approx(kept, abs=1e-4) and kept.mean() > 0.5
    lost = {m.name: m.value for m in weight_distance(unlearned, original)}
    assert lost["lost_by_rounding(bits=4)"] > 0.99 > 0.5 > lost["lost_by_rounding(bits=8)"]


def test_an_adapter_is_merged_before_the_rounding():
    shallow = planted()[1]
    merged = copy.deepcopy(shallow).merge_and_unload()
    expected = quantization(subject(merged), DATA, bits=4)
    assert quantization(subject(shallow), DATA, bits=4) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="from 2 to 8, got 1"):
        quantization(subject(shallow), DATA, bits=1)
