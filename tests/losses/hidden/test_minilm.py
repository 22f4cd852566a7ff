"""Against loops in float64."""

import math

import pytest
import torch
from losses.hidden_problem import MASK, random

from hf_transfer_ext.losses.hidden import minilm


def softmax(scores):
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_values_follow_their_definition(causal, relative):
    scores = random(2, 2, 3, 3), random(2, 2, 3, 3, seed=1)
    values = random(2, 3, 4, seed=2), random(2, 3, 6, seed=3)
    found = minilm(*scores, *values, MASK, causal=causal, relative=relative)

    def size(part, read):
        """What the products of values are divided by: their width, and their mean square over the text."""
        numbers = [x for t in range(3) if read[t] for x in part[t].tolist()]
        return len(part[0]) ** 0.5 * (sum(x * x for x in numbers) / len(numbers) if relative else 1.0)

    for b in range(2):
        for t in range(3):
            seen = [s for s in range(3) if MASK[b, s] and (s <= t or not causal)]
            want = 0.0
            for a in range(2 if MASK[b, t] else 0):
                q, p = (softmax([side[b, a, t, s].item() for s in seen]) for side in scores)
                want += kl(p, q) / 2
                q, p = (
                    softmax([(part[t] @ part[s]).item() / size(part, MASK[b]) for s in seen])
                    for part in (side[b].unflatten(-1, (2, -1))[:, a] for side in values)
                )  # fmt: skip
                want += kl(p, q) / 2
            assert found[b, t].item() == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_a_student_that_attends_alike_loses_nothing_and_the_teacher_gets_no_gradient():
    scores, values = random(2, 2, 3, 3), random(2, 3, 4, seed=2)
    torch.testing.assert_close(
        minilm(scores, scores + 3.0, values, values, MASK), torch.zeros(2, 3), atol=1e-6, rtol=0
    )
    own = [x.clone().requires_grad_() for x in (scores, values)]
    other = [random(2, 2, 3, 3, seed=4).requires_grad_(), random(2, 3, 4, seed=5).requires_grad_()]
    minilm(own[0], other[0], own[1], other[1], MASK).sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in own) and other[0].grad is None
    with pytest.raises(ValueError, match="the student has 2 heads and the teacher 4"):
        minilm(scores, random(2, 4, 3, 3), values, values, MASK)
