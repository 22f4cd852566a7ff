import math

import pytest
import torch

from hf_transfer_ext.losses.unlearning import causal_whp


def test_it_equals_the_definition_by_loops():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, dtype=torch.float64, generator=draw)
    teacher = torch.randn(3, 6, dtype=torch.float64, generator=draw).softmax(-1)
    kept = teacher.topk(3)
    expected = []
    for row, p, ids in zip(logits, kept.values.tolist(), kept.indices.tolist(), strict=True):
        q = row.softmax(-1).tolist()
        known = sum(own * math.log(own / q[i]) for own, i in zip(p, ids, strict=True))
        rest_p, rest_q = 1 - sum(p), 1 - sum(q[i] for i in ids)
        expected.append(known + rest_p * math.log(rest_p / rest_q))
    found = causal_whp(logits, kept.values, kept.indices)
    assert found.tolist() == pytest.approx(expected, rel=1e-9) and min(expected) > 0


def test_it_is_0_where_the_model_is_its_teacher_and_at_a_token_without_one():
    logits = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    kept = logits.detach().softmax(-1).topk(2)
    probs = kept.values.clone()
    probs[1] = 0.0
    loss = causal_whp(logits, probs, kept.indices)
    loss.sum().backward()
    assert loss.abs().max().item() < 1e-12 and logits.grad.abs().max().item() < 1e-12
