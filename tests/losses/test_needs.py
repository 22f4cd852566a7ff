import pytest
import torch

from hf_transfer_ext.losses.autoencoder import fitted
from hf_transfer_ext.losses.needs import (
    NEEDS,
    ForwardPass,
    check_loss,
    example_arguments,
    needs_of,
    of_alternative,
    of_reference,
    random_direction,
)
from hf_transfer_ext.losses.unlearning import dpo, rmu

FOUND = ForwardPass(
    log_probs=torch.tensor([-1.0, -2.0, -3.0]),
    targets=torch.tensor([4, 5, 6]),
    lengths=torch.tensor([1, 2]),
    logits=torch.zeros(3, 7),
    hidden=torch.ones(3, 2),
    refusal_ids=[8, 9],
    seed=3,
    index=torch.tensor([1, 0]),
    prepared={
        "forget_outputs": torch.tensor([0.5, 0.25]),
        "picked": torch.tensor([0.0, 2.0]),
        "cluster_centers": torch.zeros(2, 2),
        "cluster_tokens": torch.tensor([1, 2]),
        "whitening": torch.eye(2),
        "teacher_starts": torch.tensor([0, 2]),
        "teacher_probs": torch.tensor([[0.1], [0.2], [0.3]]),
        "teacher_ids": torch.tensor([[4], [5], [6]]),
        **fitted(torch.randn(8, 2), "forget", sizes=(2, 2, 1), steps=1),
    },
)


def test_needs_are_read_from_a_forward_pass():
    read = {name: need.read(FOUND) for name, need in NEEDS.items()}
    assert read["nll"].tolist() == [1.0, 5.0] == read["reference_nll"].tolist()
    assert read["lengths"].tolist() == [1.0, 2.0] and read["lengths"].dtype == torch.float32
    assert read["refusal_targets"].tolist() == [8, 8, 9]  # it starts anew with each answer
    torch.testing.assert_close(read["control"], random_direction(2, 3))
    assert read["control"].norm().item() == pytest.approx(1.0)
    assert read["target_outputs"].tolist() == [0.25, 0.5]
    assert read["picked"].tolist() == [2.0, 0.0]
    assert read["teacher_ids"].flatten().tolist() == [6, 4, 5]  # the one token of row 1, then the two of row 0


@pytest.mark.parametrize("need", NEEDS.values(), ids=lambda need: need.name)
def test_a_need_says_what_it_is(need):
    sizes = {"tokens": 3, "sequences": 2, "vocab": 7, "hidden": 2, "clusters": 2, "shortlist": 1}
    value = need.read(FOUND)
    example = need.example(sizes)
    assert value.shape == example.shape == tuple(sizes[axis] for axis in need.axes)
    assert value.is_floating_point() == example.is_floating_point() == (need.values != "token id")
    assert not (need.of_reference and need.differentiable)
    assert need.values != "share" or bool((example >= 0).all() and (example.sum(-1) <= 1).all())
    bounds = {"<= 0": example <= 0, ">= 0": example >= 0, "count": example >= 1}
    assert need.values not in bounds or bool(bounds[need.values].all())


def test_reference_and_alternative_are_attributes():
    need = of_reference(of_alternative(NEEDS["nll"]))
    assert need.name == "reference_alternative_nll" and NEEDS[need.name] == need
    assert need.of_reference and need.of_alternative and need.source == (True, "reference")
    assert NEEDS["alternative_nll"].differentiable and not need.differentiable
    assert [n.source for n in needs_of(dpo)] == [
        (False, "trained"),
        (False, "reference"),
        (True, "trained"),
        (True, "reference"),
    ]


def test_what_was_not_kept_is_named():
    with pytest.raises(ValueError, match="did not keep its logits"):
        NEEDS["logits"].read(ForwardPass(FOUND.log_probs, FOUND.targets, FOUND.lengths))
    with pytest.raises(ValueError, match="refusal has no tokens"):
        NEEDS["refusal_targets"].read(ForwardPass(FOUND.log_probs, FOUND.targets, FOUND.lengths))
    with pytest.raises(ValueError, match="reads 'whitening', which the method has to compute"):
        NEEDS["whitening"].read(ForwardPass(FOUND.log_probs, FOUND.targets, FOUND.lengths))
    with pytest.raises(ValueError, match="does not know which rows"):
        NEEDS["target_outputs"].read(ForwardPass(FOUND.log_probs, FOUND.targets, FOUND.lengths))


def test_examples_are_the_same_each_time():
    first, again = example_arguments(rmu), example_arguments(rmu)
    assert first.keys() == {"hidden", "control"}
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_registered_losses_are_checked_with_the_words_of_the_needs():
    def loss(log_probs, temperatures):
        return log_probs

    with pytest.raises(ValueError, match=r"'temperatures'.*nll \(negative log-likelihood of each answer"):
        check_loss(loss)
