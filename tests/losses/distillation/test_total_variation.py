import math

import pytest
import torch

from hf_transfer_ext.losses.distillation.total_variation import total_variation


def test_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4)."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    assert total_variation(student, teacher).item() == pytest.approx(0.25, rel=1e-5)


def test_symmetric_and_one_for_models_that_share_no_token():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 9, generator=generator)
    torch.testing.assert_close(total_variation(student, teacher), total_variation(teacher, student))
    apart = torch.tensor([[[0.0, -math.inf]]]), torch.tensor([[[-math.inf, 0.0]]])
    assert total_variation(*apart).item() == pytest.approx(1.0)


def test_it_is_the_mass_that_has_to_be_moved():
    """Half the L1 distance equals the sum of what the student has too much."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(1, 4, 9, generator=generator), torch.randn(1, 4, 9, generator=generator)
    excess = (student.softmax(-1) - teacher.softmax(-1)).clamp(min=0).sum(-1)
    torch.testing.assert_close(total_variation(student, teacher), excess)
