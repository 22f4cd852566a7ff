import math

import pytest
import torch

from hf_transfer_ext.losses.distillation.forward_kl import forward_kl
from hf_transfer_ext.losses.distillation.generalized_jsd import generalized_jsd
from hf_transfer_ext.losses.distillation.reverse_kl import reverse_kl


def two_models():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 9, generator=generator)


def test_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4), so that the mixture is (5/8, 3/8)."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3.0), 0.0]]])
    of_teacher = 0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)
    of_student = 0.5 * math.log(0.8) + 0.5 * math.log(4 / 3)
    assert generalized_jsd(student, teacher).item() == pytest.approx(0.5 * of_teacher + 0.5 * of_student, rel=1e-5)


def test_symmetric_at_one_half_only():
    student, teacher = two_models()
    torch.testing.assert_close(generalized_jsd(student, teacher), generalized_jsd(teacher, student))
    exchanged = generalized_jsd(teacher, student, beta=0.7)
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=0.3), exchanged)
    assert not torch.allclose(generalized_jsd(student, teacher, beta=0.7), exchanged)


def test_bounded_by_the_entropy_of_the_mixing_weights():
    """Reached by two models that share no token: H(beta) nats."""
    closed = -1e4
    student, teacher = torch.tensor([[[0.0, closed]]]), torch.tensor([[[closed, 0.0]]])
    for beta in (0.1, 0.5, 0.8):
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert generalized_jsd(student, teacher, beta=beta).item() == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("small", [1e-3, 1e-4])
def test_its_ends_tend_to_the_two_kls(small):
    student, teacher = two_models()
    forward = generalized_jsd(student, teacher, beta=small) / small
    torch.testing.assert_close(forward, forward_kl(student, teacher), rtol=60 * small, atol=2e-3)
    reverse = generalized_jsd(student, teacher, beta=1 - small) / small
    torch.testing.assert_close(reverse, reverse_kl(student, teacher), rtol=60 * small, atol=2e-3)
