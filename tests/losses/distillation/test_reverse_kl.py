import math

import pytest
import torch

from hf_transfer_ext.losses.distillation.forward_kl import forward_kl
from hf_transfer_ext.losses.distillation.reverse_kl import reverse_kl


def test_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4)."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    assert reverse_kl(student, teacher).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-5)


def test_it_is_forward_kl_with_the_roles_exchanged():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 9, generator=generator)
    torch.testing.assert_close(reverse_kl(student, teacher), forward_kl(teacher, student))


def test_it_prefers_one_mode_where_forward_kl_prefers_to_cover_both():
    """A teacher of two modes, a student on one of them or spread over all: each divergence names its favorite."""
    teacher = torch.tensor([[[5.0, 0.0, 5.0]]])
    one_mode, spread = torch.tensor([[[5.0, 0.0, -5.0]]]), torch.zeros(1, 1, 3)
    assert reverse_kl(one_mode, teacher).item() < reverse_kl(spread, teacher).item()
    assert forward_kl(one_mode, teacher).item() > forward_kl(spread, teacher).item()
