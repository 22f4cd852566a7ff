"""Against loops in float64."""

import math

import pytest
import torch
from losses.hidden_problem import MASK, random

from hf_transfer_ext.losses.hidden import attention_relation
from hf_transfer_ext.losses.hidden.attention_relation import paper_heads


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_relations_follow_their_definition(causal, relative):
    student, teacher = random(2, 3, 4), random(2, 3, 6, seed=1)
    found = attention_relation(student, teacher, MASK, heads=2, causal=causal, relative=relative)

    def relation(states, b, a, t):
        width = states.shape[-1] // 2
        part = states[b, :, a * width : (a + 1) * width]
        seen = [s for s in range(3) if MASK[b, s] and (s <= t or not causal)]
        numbers = [x for s in range(3) if MASK[b, s] for x in part[s].tolist()]
        size = width**0.5 * (sum(x * x for x in numbers) / len(numbers) if relative else 1.0)
        scores = [math.exp(sum(x * y for x, y in zip(part[t].tolist(), part[s].tolist(), strict=True)) / size)
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
    one, two = (attention_relation(side, teacher, MASK, heads=1) for side in (student, turned))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="`heads` has to divide both widths, got 4 relation heads and width 6"):
        attention_relation(student, teacher, MASK, heads=4)


def test_the_size_of_either_models_vectors_does_not_matter():
    """Values that are larger, and read by weights that are smaller, are the same model."""
    student, teacher = random(2, 3, 4), random(2, 3, 8, seed=1)
    one = attention_relation(student, teacher, MASK, heads=2)
    torch.testing.assert_close(attention_relation(6 * student, 0.1 * teacher, MASK, heads=2), one)
    torch.testing.assert_close(attention_relation(student, 9 * student, MASK, heads=2), torch.zeros(2, 3))
    plain = attention_relation(student, teacher, MASK, heads=2, relative=False)
    larger = attention_relation(6 * student, teacher, MASK, heads=2, relative=False)
    assert (larger - plain).abs().max() > 1
    padded = student.masked_fill(~MASK[:, :, None], 1e3)
    torch.testing.assert_close(attention_relation(padded, teacher, MASK, heads=2), one)


@pytest.mark.parametrize(
    "widths, heads",
    [((768, 768), 48), ((1024, 1024), 64), ((384, 768), 48), ((384, 1024), 64), ((312, 768), 24), ((4, 6), 1)],
)
def test_the_default_heads_are_those_of_the_paper(widths, heads):
    assert paper_heads(*widths) == heads
    student, teacher = random(1, 3, widths[0]), random(1, 3, widths[1], seed=1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert torch.equal(
        attention_relation(student, teacher, mask), attention_relation(student, teacher, mask, heads=heads)
    )


def test_gradients_reach_the_student_alone():
    student, teacher = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_()
    attention_relation(student, teacher, MASK, heads=2).sum().backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0 and teacher.grad is None
