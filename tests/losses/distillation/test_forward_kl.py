import math

import pytest
import torch

from hf_transfer_ext.losses.distillation.forward_kl import forward_kl


def test_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4)."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    assert forward_kl(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_it_is_cross_entropy_less_the_teachers_entropy():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 9, generator=generator)
    p = teacher.softmax(-1)
    cross_entropy = torch.nn.functional.cross_entropy(student.reshape(-1, 9), p.reshape(-1, 9), reduction="none")
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), cross_entropy.reshape(2, 3) - entropy)


def test_infinite_where_the_student_excludes_what_the_teacher_says_and_not_the_other_way_round():
    open_logits, closed = torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0.0, -math.inf]]])
    assert forward_kl(closed, open_logits).item() == math.inf
    assert forward_kl(open_logits, closed).item() == pytest.approx(math.log(3 / 2), rel=1e-5)
