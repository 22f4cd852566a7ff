"""Against loops in float64."""

import math

import pytest
import torch
from losses.hidden_problem import MASK, random

from hf_transfer_ext.losses.hidden import attention_relation


@pytest.mark.parametrize("causal", [True, False])
def test_relations_follow_their_definition(causal):
    student, teacher = random(2, 3, 4), random(2, 3, 6, seed=1)
    found = attention_relation(student, teacher, MASK, heads=2, causal=causal)

    def relation(states, b, a, t):
        width = states.shape[-1] // 2
        part = states[b, :, a * width : (a + 1) * width]
        seen = [s for s in range(3) if MASK[b, s] and (s <= t or not causal)]
        scores = [math.exp(sum(x * y for x, y in zip(part[t].tolist(), part[s].tolist(), strict=True)) / width**0.5)
                  for s in seen]  # fmt: skip
        return [score / sum(scores) for score in scores]

    for b in range(2):
        for t in range(3):
            want = 0.0
            if MASK[b, t]:
                for a in range(2):
                    q, p = relation(student, b, a, t), relation(teacher, b, a, t)
                    want += sum(y * math.log(y / x) for x, y in zip(q, p, strict=True)) / 2
            assert found[b, t].item() == pytest.approx(want, rel=1e-3, abs=1e-6)
    turned = student @ torch.linalg.qr(random(4, 4, seed=3)).Q  # relations do not see a rotation of all dimensions
    one, two = (attention_relation(side, teacher, MASK) for side in (student, turned))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="`heads` has to divide both widths, got 4 relation heads and width 6"):
        attention_relation(student, teacher, MASK, heads=4)


def test_gradients_reach_the_student_alone():
    student, teacher = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_()
    attention_relation(student, teacher, MASK, heads=2).sum().backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0 and teacher.grad is None
