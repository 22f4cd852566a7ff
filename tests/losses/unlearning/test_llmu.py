import pytest
import torch

from hf_transfer_ext.losses.unlearning.idk import idk
from hf_transfer_ext.losses.unlearning.llmu import llmu


def test_it_equals_the_definition():
    torch.manual_seed(0)
    own = [torch.log_softmax(torch.randn(n, dtype=torch.float64), -1) for n in (2, 5, 1)]
    other = [torch.log_softmax(torch.randn(n, dtype=torch.float64), -1) for n in (4, 1, 3)]
    expected = [-0.7 * sum(-a) / len(a) + sum(-b) / len(b) for a, b in zip(own, other, strict=True)]

    def sums(answers):
        return torch.stack([-a.sum() for a in answers]), torch.tensor([len(a) for a in answers]).double()

    found = llmu(*sums(own), *sums(other), ascent=0.7)
    assert found.tolist() == pytest.approx([float(value) for value in expected], rel=1e-12)


def test_by_hand():
    # 2 nats a token on the answer, 3 on the random one: 3 - 2 / 2.
    value = llmu(torch.tensor([8.0]), torch.tensor([4.0]), torch.tensor([6.0]), torch.tensor([2.0]))
    assert value.tolist() == [2.0]


def test_without_ascent_it_is_idk_towards_random_answers():
    nll, lengths = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    assert torch.equal(llmu(nll + 9, lengths, nll, lengths, ascent=0.0), idk(nll, lengths))


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="`ascent` must be >= 0, got -1"):
        llmu(*[torch.ones(1)] * 4, ascent=-1.0)
