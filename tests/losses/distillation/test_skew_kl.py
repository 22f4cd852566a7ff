import math

import pytest
import torch

from hf_transfer_ext.losses.distillation.forward_kl import forward_kl
from hf_transfer_ext.losses.distillation.skew_kl import skew_kl


def test_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4), so that the mixture is (0.525, 0.475)."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    expected = 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475)
    assert skew_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_skew_it_is_forward_kl():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 9, generator=generator)
    torch.testing.assert_close(skew_kl(student, teacher, skew=0.0), forward_kl(student, teacher))


@pytest.mark.parametrize("skew", [0.1, 0.5])
def test_finite_where_the_student_excludes_what_the_teacher_says(skew):
    student, teacher = torch.tensor([[[0.0, -math.inf]]]), torch.tensor([[[-math.inf, 0.0]]])
    assert skew_kl(student, teacher, skew=skew).item() == pytest.approx(-math.log(skew), rel=1e-5)
