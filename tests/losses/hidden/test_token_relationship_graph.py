"""Against loops in float64."""

import math

import pytest
import torch
from losses.hidden_problem import random

from hf_transfer_ext.losses.hidden import token_relationship_graph

MASK = torch.tensor([[True] * 5, [True, True, True, True, False]])


def graph(states, around, sigma):
    def squared(i, j):
        return sum((a - b) ** 2 for a, b in zip(states[i], states[j], strict=True))

    found = {}
    for i, near in around.items():
        mean = sum(squared(i, j) for j in near) / len(near)
        powers = {j: math.exp(-squared(i, j) / (2 * sigma * mean)) for j in near}
        found[i] = {j: power / sum(powers.values()) for j, power in powers.items()}
    return found


def relations(states, real):
    width = len(states[0])
    found = {}
    for i in range(real):
        powers = [
            math.exp(sum(a * b for a, b in zip(states[i], states[j], strict=True)) / width**0.5) for j in range(real)
        ]
        found[i] = [power / sum(powers) for power in powers]
    return found


def test_it_follows_its_definition():
    student, teacher = random(2, 5, 3), random(2, 5, 4, seed=1)
    found = token_relationship_graph(
        student, teacher, MASK, neighbors=2, sigma=0.7, local_weight=0.4, inner_weight=1.5
    )
    for b in range(2):
        real, s, t = int(MASK[b].sum()), student[b].tolist(), teacher[b].tolist()
        around = {}
        for i in range(real):
            others = [j for j in range(real) if j != i]
            around[i] = sorted(others, key=lambda j: sum((x - y) ** 2 for x, y in zip(t[i], t[j], strict=True)))[:2]
        p, q, r, o = graph(t, around, 0.7), graph(s, around, 0.7), relations(t, real), relations(s, real)
        for i in range(5):
            want = 0.0
            if i < real:
                local = sum(p[i][j] * math.log(p[i][j] / q[i][j]) for j in around[i])
                want = 0.4 * local + 1.5 * sum((x - y) ** 2 for x, y in zip(r[i], o[i], strict=True))
            assert found[b, i].item() == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_the_graph_does_not_see_rotation_translation_scale_and_width():
    student, teacher = random(2, 5, 4), random(2, 5, 6, seed=1)
    turned = 3 * student @ torch.linalg.qr(random(4, 4, seed=2)).Q + random(4, seed=3)
    wide = torch.cat([student, torch.zeros(2, 5, 3)], -1)
    one = token_relationship_graph(student, teacher, MASK, inner_weight=0.0)
    for other in (turned, wide):
        two = token_relationship_graph(other, teacher, MASK, inner_weight=0.0)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(token_relationship_graph(teacher, teacher, MASK), torch.zeros(2, 5), atol=1e-5, rtol=0)


def test_a_text_of_one_token_has_no_neighbors_and_padding_changes_nothing():
    student, teacher = random(1, 1, 4).requires_grad_(), random(1, 1, 4, seed=1)
    alone = token_relationship_graph(student, teacher, torch.ones(1, 1, dtype=torch.bool))
    alone.sum().backward()
    assert alone.item() == 0 and student.grad.isfinite().all()
    states, others = random(1, 3, 4), random(1, 3, 4, seed=1)
    short = token_relationship_graph(states, others, torch.ones(1, 3, dtype=torch.bool))
    padded = [torch.cat([side, 100 * torch.ones(1, 2, 4)], 1) for side in (states, others)]
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(token_relationship_graph(*padded, mask)[:, :3], short, rtol=1e-3, atol=1e-5)


def test_gradients_reach_the_student_alone_and_options_are_checked():
    student, teacher = random(2, 5, 4).requires_grad_(), random(2, 5, 4, seed=1).requires_grad_()
    token_relationship_graph(student, teacher, MASK, neighbors=3).sum().backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0 and teacher.grad is None
    with pytest.raises(ValueError, match="needs `neighbors` >= 1, `sigma` > 0 and weights >= 0, got 0"):
        token_relationship_graph(student, teacher, MASK, neighbors=0)
