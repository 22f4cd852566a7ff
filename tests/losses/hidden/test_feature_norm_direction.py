"""Against loops in float64."""

import pytest
import torch
from losses.hidden_problem import random

from hf_transfer_ext.losses.hidden import feature_norm_direction


@pytest.mark.parametrize("projects", [True, False])
def test_it_follows_its_definition(projects):
    teacher, directions, projection = random(5, 4, seed=1), random(5, 4, seed=2), random(4, 3, seed=3)
    student = random(5, 3) if projects else random(5, 4) * torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0])[:, None]
    found = feature_norm_direction(student, teacher, projection if projects else None, directions)
    for i in range(5):
        own = student[i].tolist()
        if projects:
            own = [sum(w * x for w, x in zip(row, own, strict=True)) for row in projection.tolist()]
        c, t = directions[i].tolist(), teacher[i].tolist()
        norms = [sum(x * x for x in values) ** 0.5 for values in (own, t, c)]
        dot = sum(x * y for x, y in zip(own, c, strict=True)) / norms[2]
        assert found[i].item() == pytest.approx(1 - dot / max(norms[0], norms[1]), rel=1e-4, abs=1e-5)


def test_it_is_0_in_the_direction_at_the_teachers_norm_and_beyond_and_grows_below():
    direction, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    for norm, want in ((10.0, 0.0), (20.0, 0.0), (5.0, 0.5), (0.0, 1.0)):
        student = norm * direction / 5
        assert feature_norm_direction(student, teacher, None, direction).item() == pytest.approx(want, abs=1e-6)
    assert feature_norm_direction(-2 * direction, teacher, None, direction).item() == pytest.approx(2.0)


def test_gradients_reach_the_student_and_the_projection_alone():
    student, projection = random(5, 3).requires_grad_(), random(4, 3, seed=3).requires_grad_()
    teacher, directions = random(5, 4, seed=1).requires_grad_(), random(5, 4, seed=2).requires_grad_()
    feature_norm_direction(student, teacher, projection, directions).sum().backward()
    assert student.grad.abs().sum() > 0 and projection.grad.abs().sum() > 0
    assert teacher.grad is None and directions.grad is None
