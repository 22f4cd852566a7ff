import math

import pytest
import torch

from hf_transfer_ext.losses.distillation.reverse_kl import reverse_kl
from hf_transfer_ext.losses.distillation.skew_kl import skew_kl
from hf_transfer_ext.losses.distillation.skew_reverse_kl import skew_reverse_kl


def two_models():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 9, generator=generator)


def test_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4), so that the mixture is (0.725, 0.275)."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    expected = 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275)
    assert skew_reverse_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_it_is_skew_kl_with_the_roles_exchanged_and_reverse_kl_without_a_skew():
    student, teacher = two_models()
    torch.testing.assert_close(skew_reverse_kl(student, teacher, skew=0.3), skew_kl(teacher, student, skew=0.3))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, skew=0.0), reverse_kl(student, teacher))


def test_finite_where_the_teacher_excludes_what_the_student_says():
    student, teacher = torch.tensor([[[0.0, -math.inf]]]), torch.tensor([[[-math.inf, 0.0]]])
    assert skew_reverse_kl(student, teacher).item() == pytest.approx(-math.log(0.1), rel=1e-5)
