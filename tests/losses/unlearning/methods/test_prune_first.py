import pytest
import torch
from losses.unlearning.methods.quadratics import Quadratics

from hf_transfer_ext.losses.unlearning.methods import METHODS


class Matrix(Quadratics):
    """One matrix and one vector, whose gradients are all 1."""

    def __init__(self):
        super().__init__()
        self.x = torch.tensor([[3.0, -0.1], [0.2, -5.0]])
        self.vector = torch.tensor([0.01, 0.0])

    @property
    def parameters(self):
        return [self.x, self.vector]

    def gradient(self, part, around=None):
        return [torch.ones_like(p) for p in self.parameters]


@pytest.mark.parametrize(
    "sparsity, kept", [(0.0, [[1, 1], [1, 1]]), (0.5, [[1, 0], [0, 1]]), (0.75, [[0, 0], [0, 1]])]
)
def test_the_smallest_weights_are_pruned_and_held_by_hand(sparsity, kept):
    method, step = METHODS["prune_first"](sparsity=sparsity), Matrix()
    before, mask = step.x.clone(), torch.tensor(kept)
    step.prepared = method.prepare(step)
    assert torch.equal(step.x, before * mask) and step.vector[0] == 0.01
    matrix, vector = method.gradient(step)
    assert torch.equal(matrix, 2.5 * mask) and vector.tolist() == [2.5, 2.5]  # .5 * 1 + 2 * 1


def test_a_new_adapter_is_refused():
    step = Matrix()
    step.x.zero_()
    with pytest.raises(ValueError, match="a trained matrix holds zeros alone, as in a new LoRA"):
        METHODS["prune_first"]().prepare(step)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="`sparsity` must be from 0 to below 1"):
        METHODS["prune_first"](sparsity=sparsity)
