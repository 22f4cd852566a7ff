"""Against loops in float64."""

import pytest
import torch
from losses.hidden_problem import random

from hf_transfer_ext.losses.hidden import hidden_mse


def test_it_follows_its_definition():
    student, teacher, projection = random(2, 3), random(2, 4, seed=1), random(4, 3, seed=2)
    paper, found = hidden_mse(student, teacher, projection, relative=False), hidden_mse(student, teacher, projection)
    for i in range(2):
        moved = [sum(projection[j, k].item() * student[i, k].item() for k in range(3)) for j in range(4)]
        other = teacher[i].tolist()
        difference = sum((a - b) ** 2 for a, b in zip(moved, other, strict=True))
        assert paper[i].item() == pytest.approx(difference / 4)
        assert found[i].item() == pytest.approx(difference / sum(b**2 for b in other))
    torch.testing.assert_close(hidden_mse(teacher, teacher), torch.zeros(2), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="have width 3, the teacher's 4: a `projection` is needed"):
        hidden_mse(student, teacher)


def test_it_does_not_depend_on_the_size_of_the_states():
    student, teacher = random(5, 4), random(5, 4, seed=1)
    large = 500 * student, 500 * teacher
    torch.testing.assert_close(hidden_mse(*large), hidden_mse(student, teacher))
    torch.testing.assert_close(
        hidden_mse(*large, relative=False), 500**2 * hidden_mse(student, teacher, relative=False)
    )
    torch.testing.assert_close(hidden_mse(torch.zeros(5, 4), teacher), torch.ones(5))
    assert hidden_mse(student, torch.zeros(5, 4)).isfinite().all()


def test_gradients_reach_the_student_and_the_projection_alone():
    student, teacher = random(6, 4).requires_grad_(), random(6, 4, seed=1).requires_grad_()
    projection = random(4, 4, seed=2).requires_grad_()
    hidden_mse(student, teacher, projection).sum().backward()
    assert student.grad.isfinite().all() and projection.grad.abs().sum() > 0 and teacher.grad is None
