"""Against loops in float64."""

import pytest
import torch
from losses.hidden_problem import random

from hf_transfer_ext.losses.hidden import hidden_mse


def test_it_follows_its_definition():
    student, teacher, projection = random(2, 3), random(2, 4, seed=1), random(4, 3, seed=2)
    found = hidden_mse(student, teacher, projection)
    for i in range(2):
        moved = [sum(projection[j, k].item() * student[i, k].item() for k in range(3)) for j in range(4)]
        other = teacher[i].tolist()
        assert found[i].item() == pytest.approx(sum((a - b) ** 2 for a, b in zip(moved, other, strict=True)) / 4)
    torch.testing.assert_close(hidden_mse(teacher, teacher), torch.zeros(2), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="have width 3, the teacher's 4: a `projection` is needed"):
        hidden_mse(student, teacher)


def test_gradients_reach_the_student_and_the_projection_alone():
    student, teacher = random(6, 4).requires_grad_(), random(6, 4, seed=1).requires_grad_()
    projection = random(4, 4, seed=2).requires_grad_()
    hidden_mse(student, teacher, projection).sum().backward()
    assert student.grad.isfinite().all() and projection.grad.abs().sum() > 0 and teacher.grad is None
