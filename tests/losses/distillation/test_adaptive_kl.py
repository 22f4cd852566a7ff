import math

import oracles
import pytest
import torch

from hf_transfer_ext.losses.distillation.adaptive_kl import adaptive_kl
from hf_transfer_ext.losses.distillation.forward_kl import forward_kl


def test_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4): the head is the first token alone, with half of the gap."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert adaptive_kl(student, teacher).item() == pytest.approx(0.5 * forward + 0.5 * reverse, rel=1e-5)


def test_forward_kl_where_the_head_is_everything():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 9, generator=generator)
    torch.testing.assert_close(adaptive_kl(student, teacher, head_mass=1.0), forward_kl(student, teacher))


@pytest.mark.parametrize("head_mass", [0.5, 0.97])
@pytest.mark.parametrize("excluded", [0, 500])
def test_a_head_beyond_the_first_sorted_tokens(head_mass, excluded):
    """A flat teacher needs half of a large vocabulary for its head, far more than the first sorted slice."""
    generator = torch.Generator().manual_seed(0)
    student = 0.3 * torch.randn(1, 2, 3000, generator=generator)
    teacher = 0.1 * torch.randn(1, 2, 3000, generator=generator)
    student[..., :excluded] = teacher[..., :excluded] = -math.inf
    teacher[0, 1, -1] = 12.0  # a row that needs one token, beside one that needs many
    result = adaptive_kl(student, teacher, head_mass=head_mass)
    for s in range(2):
        expected = oracles.value("adaptive_kl", student[0, s], teacher[0, s], head_mass=head_mass)
        assert result[0, s].item() == pytest.approx(expected, rel=1e-3)
