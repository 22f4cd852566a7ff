"""Running means of classes, the nearest one, and the contrast between two languages, by their definitions."""

import math

import pytest
import torch

from hf_transfer_ext.losses.prototypes import Prototypes, class_means, prototype_alignment
from hf_transfer_ext.tensors import IGNORE_INDEX


def test_prototypes_are_running_means_of_the_classes_that_occur():
    found = Prototypes(3, 2, rate=0.75)
    assert found.nearest(torch.zeros(2, 2)).tolist() == [IGNORE_INDEX] * 2
    found.update(torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 8.0]]), torch.tensor([0, 0, 2]))
    assert found.centers.tolist() == [[3.0, 0.0], [0.0, 0.0], [0.0, 8.0]]
    found.update(torch.tensor([[7.0, 4.0]]), torch.tensor([0]))
    assert found.centers.tolist() == [[4.0, 1.0], [0.0, 0.0], [0.0, 8.0]]
    assert found.nearest(torch.tensor([[0.0, 0.0], [0.0, 7.0]])).tolist() == [0, 2]  # class 1 was never seen
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Prototypes(3, 2, rate=1.0)


def test_the_alignment_is_a_contrast_of_cosines():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=random, requires_grad=True)
    classes = torch.tensor([0, 0, 1, 2, 2, 2])
    others = Prototypes(4, 4)
    others.update(torch.randn(3, 4, generator=random), torch.tensor([0, 1, 3]))
    means, occurs = class_means(features, classes, 4)
    assert occurs.tolist() == [True, True, True, False]
    torch.testing.assert_close(means[2], features[3:].mean(0))
    cos = torch.nn.functional.cosine_similarity
    expected = 0.0
    for k in (0, 1):  # on both sides
        scores = [math.exp(cos(means[k], others.centers[j], dim=0).item() / 0.5) for j in (0, 1, 3)]
        expected -= math.log(scores[k] / sum(scores)) / 2
    found = prototype_alignment(means, occurs, others, temperature=0.5)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert features.grad[:3].abs().sum() > 0 and torch.isfinite(features.grad).all()
    assert prototype_alignment(means, occurs, Prototypes(4, 4)).item() == 0.0
