import pytest
import torch
from losses.unlearning.methods.answers import Answers

from hf_transfer_ext.losses.needs import ForwardPass
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning.methods.dmm import change_without


@pytest.mark.parametrize("rows", [30, 7])
def test_removing_rows_from_least_squares_equals_the_refit(rows):
    """Exact influence: with W = 1 and q the residuals, the predicted outputs are those of a ridge refit."""
    draw = torch.Generator().manual_seed(rows)
    x, y = torch.randn(rows, 9, dtype=torch.float64, generator=draw), torch.randn(rows, generator=draw).double()
    forget, retain = slice(0, 3), slice(3, None)
    ridge = 1e-2
    penalty = ridge * x[retain].square().sum() / 9 * torch.eye(9).double()
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    refit = torch.linalg.solve(x[retain].T @ x[retain] + penalty, x[retain].T @ y[retain])
    ones = torch.ones(rows - 3).double()
    change = change_without(x[forget], (y - x @ weights)[forget], x[retain], ones, ridge)
    torch.testing.assert_close(weights + change, refit)


def linear_answers(x, weights):
    """Answers of one token whose margin is x . weights."""
    return [
        lambda row=row: ForwardPass(
            torch.nn.functional.logsigmoid(row @ weights)[None], torch.zeros(1, dtype=torch.int64), torch.tensor([1])
        )
        for row in x
    ]


def test_the_targets_of_a_linear_model_equal_the_newton_step_in_float64():
    draw = torch.Generator().manual_seed(0)
    forget, retain = torch.randn(2, 4, generator=draw), torch.randn(6, 4, generator=draw)
    weights = torch.randn(4, generator=draw).requires_grad_(True)
    # As many places as leave no two of the four weights on the same one, so that the projection is exact.
    method = METHODS["dmm"](projection=512, ridge=1e-3, multiplier=0.5)
    step = Answers({"forget": linear_answers(forget, weights), "retain": linear_answers(retain, weights)}, [weights])
    found = method.prepare(step)
    w, f, r = weights.detach().double(), forget.double(), retain.double()
    certain = torch.sigmoid(r @ w)
    matrix = r.T @ ((certain * (1 - certain))[:, None] * r)
    matrix += 1e-3 * matrix.diagonal().sum() / 512 * torch.eye(4)
    change = -torch.linalg.solve(matrix, f.T @ (1 - torch.sigmoid(f @ w)))
    for part, x in (("forget", f), ("retain", r)):
        torch.testing.assert_close(found[f"{part}_outputs"].double(), x @ (w + 0.5 * change), atol=2e-3, rtol=2e-3)
    assert (found["forget_outputs"].double() < f @ w).all()  # what is removed becomes less certain
    bounded = METHODS["dmm"](projection=512, ridge=1e-3, largest_change=0.125).prepare(step)
    torch.testing.assert_close(bounded["forget_outputs"].double(), f @ w - 0.125, atol=1e-5, rtol=1e-5)


def test_with_a_multiplier_of_0_the_targets_are_the_outputs():
    weights = torch.tensor([0.3, -1.0], requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    step = Answers({"forget": linear_answers(x, weights), "retain": linear_answers(x, weights)}, [weights])
    found = METHODS["dmm"](projection=16, multiplier=0.0).prepare(step)
    torch.testing.assert_close(found["retain_outputs"], (x @ weights).detach())


def test_options_out_of_range_are_refused():
    for option, value, bound in (("projection", 0, ">= 1"), ("ridge", 0.0, "> 0"), ("multiplier", -1.0, ">= 0"),
                                 ("largest_change", -1.0, ">= 0")):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{option}` must be {bound}"):
            METHODS["dmm"](**{option: value})
