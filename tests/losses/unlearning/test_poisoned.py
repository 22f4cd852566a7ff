import torch

from hf_transfer_ext.losses.unlearning.poisoned import poisoned


def test_by_hand_the_mean_over_all_is_that_over_the_picked():
    nll, lengths = torch.tensor([6.0, 8.0, 5.0]), torch.tensor([2.0, 4.0, 1.0])
    picked = torch.tensor([1.5, 1.5, 0.0])  # two of three
    assert poisoned(nll, lengths, picked).tolist() == [4.5, 3.0, 0.0]
    assert poisoned(nll, lengths, picked).mean() == (3.0 + 2.0) / 2


def test_against_its_definition():
    draw = torch.Generator().manual_seed(0)
    nll = 9 * torch.rand(7, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, 9, (7,), generator=draw).double()
    picked = torch.rand(7, generator=draw, dtype=torch.float64)
    expected = [float(w) * float(x) / float(n) for w, x, n in zip(picked, nll, lengths, strict=True)]
    assert poisoned(nll, lengths, picked).tolist() == expected


def test_an_answer_that_was_not_picked_gets_no_gradient():
    nll = torch.tensor([6.0, 8.0], requires_grad=True)
    poisoned(nll, torch.tensor([2.0, 4.0]), torch.tensor([2.0, 0.0])).sum().backward()
    assert nll.grad.tolist() == [1.0, 0.0]
