import pytest
import torch
from adapters.transfer.pairs import SIZES, dense, twin

from hf_transfer_ext.adapters.transfer.methods.ridge import ridge, ridge_map


@pytest.mark.parametrize("kind", SIZES)
def test_a_base_in_other_coordinates_gets_the_change_in_those_coordinates(kind):
    pair, expected = twin(kind, rotated=True)
    torch.testing.assert_close(dense(ridge(pair, regularization=1e-9)), expected, rtol=1e-2, atol=1e-2)


def test_the_map_minimizes_its_objective():
    """Written from the definition, in float64: no small step from the solution makes the penalized error smaller."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator).double(), torch.randn(50, 4, generator=generator).double()
    gamma = 0.1 * (x.T @ x).diagonal().mean()
    found = ridge_map(x.float(), y.float(), 0.1).double().requires_grad_()
    objective = ((x @ found - y) ** 2).sum() + gamma * (found**2).sum()
    (slope,) = torch.autograd.grad(objective, found)
    assert slope.abs().max() < 1e-3 * (x.T @ y).abs().max()


def test_constant_inputs_and_bad_options():
    assert torch.isfinite(ridge_map(torch.zeros(5, 3), torch.ones(5, 2), 0.1)).all()
    with pytest.raises(ValueError, match="`regularization` must be greater than 0"):
        ridge(twin("q_proj")[0], regularization=0.0)
