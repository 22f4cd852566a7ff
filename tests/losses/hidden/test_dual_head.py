"""Against loops in float64."""

import math

import pytest
import torch
from losses.hidden_problem import random

from hf_transfer_ext.losses.hidden import dual_head


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("temperature, top", [(2.0, 64), (0.7, 3)])
def test_it_is_the_bernoulli_kl_of_its_definition(temperature, top, centered):
    student, teacher = 3 * random(4, 6), 3 * random(4, 6, seed=1)
    found = dual_head(student, teacher, temperature=temperature, top=top, centered=centered)
    for i in range(4):
        chosen = sorted(range(6), key=lambda v: -teacher[i, v].item())[:top]
        want, constant = 0.0, 0.0
        if centered:
            constant = sum(student[i, v].item() - teacher[i, v].item() for v in chosen) / len(chosen)
        for v in chosen:
            s = 1 / (1 + math.exp(-(student[i, v].item() - teacher[i, v].item() - constant) / temperature))
            want += 0.5 * math.log(0.5 / s) + 0.5 * math.log(0.5 / (1 - s))
        assert found[i].item() == pytest.approx(temperature**2 * want / len(chosen), rel=1e-3, abs=1e-6)


def test_it_is_0_for_equal_logits_alone_and_sees_a_constant_where_it_is_not_centered():
    teacher = 3 * random(4, 6, seed=1)
    torch.testing.assert_close(dual_head(teacher, teacher), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(dual_head(teacher + 5, teacher), torch.zeros(4), atol=1e-5, rtol=0)
    assert (dual_head(teacher + 1, teacher, centered=False) > 0.1 / 6).all()


def test_its_gradient_is_bounded_for_any_logits_and_reaches_the_student_alone():
    student, teacher = (1e4 * random(4, 6)).requires_grad_(), random(4, 6, seed=1).requires_grad_()
    dual_head(student, teacher, centered=False).sum().backward()
    assert (student.grad.abs() <= (1 + 1e-6) / 6).all() and student.grad.abs().max() > 0.9 / 6 and teacher.grad is None
    with pytest.raises(ValueError, match=r"needs `temperature` > 0 and `top` >= 1, got 2.0 and 0"):
        dual_head(student, teacher, top=0)
