from itertools import combinations

import pytest
import torch

from hf_transfer_ext.data.candidates import Candidates, per_example_gradients
from hf_transfer_ext.data.selection.worst_case import LinearUnlearning, onto_simplex, worst_case


def candidates(rows=10, parameters=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(rows, parameters, generator=generator)
    return Candidates(rows, 1 + torch.rand(rows, generator=generator), gradients)


def test_the_algorithm_by_its_definition():
    """Both levels as loops over rows and parameters, the projection by a sum over a fine grid of thresholds."""
    found, rows, count, step, rate, gamma = candidates(), 10, 3, 2.0, 0.05, 0.1
    losses, gradients = found.losses.tolist(), found.gradients.tolist()
    weights = [count / rows] * rows
    for _ in range(6):
        change = [-step / rows * sum((1 - 2 * w) * g[p] for w, g in zip(weights, gradients, strict=True))
                  for p in range(4)]  # fmt: skip
        after = [
            loss + sum(g * c for g, c in zip(gradient, change, strict=True))
            for loss, gradient in zip(losses, gradients, strict=True)
        ]
        slopes = [sum(2 * step / rows * w * sum(a * b for a, b in zip(g, h, strict=True))
                      for w, h in zip(weights, gradients, strict=True)) for g in gradients]  # fmt: skip
        moved = [w - rate * (loss + slope + 2 * gamma * w)
                 for w, loss, slope in zip(weights, after, slopes, strict=True)]  # fmt: skip
        grid = torch.linspace(min(moved) - 1, max(moved), 2_000_001, dtype=torch.float64)
        sums = sum((value - grid).clamp(0, 1) for value in moved)
        threshold = float(grid[(sums - count).abs().argmin()])
        weights = [min(1.0, max(0.0, value - threshold)) for value in moved]
    expected = sorted(sorted(range(rows), key=lambda i: -weights[i])[:count])
    options = {"rounds": 6, "step": step, "learning_rate": rate, "penalty": gamma}
    assert worst_case(found, count, **options) == expected


def test_the_projection_is_the_nearest_point():
    torch.manual_seed(0)
    for count in (1, 3, 7):
        values = torch.randn(8, dtype=torch.float64)
        nearest = onto_simplex(values, count)
        assert float(nearest.sum()) == pytest.approx(count, abs=1e-9) and 0 <= nearest.min() <= nearest.max() <= 1
        for _ in range(50):  # no other point of the set is nearer
            other = torch.rand(8, dtype=torch.float64)
            other = onto_simplex(other * 3, count)
            assert (values - nearest).norm() <= (values - other).norm() + 1e-9
        torch.testing.assert_close(onto_simplex(nearest, count), nearest, rtol=0, atol=1e-9)
    hand = onto_simplex(torch.tensor([2.0, 0.5, 0.3, -1.0], dtype=torch.float64), 1)
    torch.testing.assert_close(hand, torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)


def test_an_example_by_hand():
    # Equal losses; gradients 1, 1, -2. From w = 1/3 the step is -(1/3)(1/3)(1 + 1 - 2) = 0: nothing moves, the first
    # wins. With losses 3, 1, 2 the second has the smallest loss.
    gradients = torch.tensor([[1.0], [1.0], [-2.0]])
    assert worst_case(Candidates(3, torch.ones(3), gradients), 1, rounds=1) == [0]
    assert worst_case(Candidates(3, torch.tensor([3.0, 1.0, 2.0]), gradients), 1, rounds=1) == [1]


def test_without_a_step_the_smallest_losses_are_chosen():
    found = candidates(20)
    expected = sorted(found.losses.argsort()[:5].tolist())
    assert worst_case(found, 5, step=0.0) == expected


def test_the_order_of_the_rows_does_not_matter():
    found = candidates(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = Candidates(12, found.losses[order], found.gradients[order])
    assert sorted(order[worst_case(shuffled, 4, step=3.0)].tolist()) == worst_case(found, 4, step=3.0)


def remembered(found, rows, step=1.0):
    """Loss that is left on a set after it was unlearned alone."""
    weights = torch.zeros(10)
    weights[list(rows)] = 1.0
    return float(LinearUnlearning.of(found.losses, found.gradients, step)(weights)[list(rows)].sum())


def test_the_set_is_among_the_worst_of_all_sets():
    """On average 2 % of all 120 sets of three are forgotten less; for a random set it would be 50 %."""
    shares = []
    for seed in range(20):
        found = candidates(10, seed=seed)
        own = remembered(found, worst_case(found, 3))
        shares.append(sum(remembered(found, rows) < own - 1e-9 for rows in combinations(range(10), 3)) / 120)
    assert sum(shares) / 20 < 0.05 and max(shares) < 0.25


def test_the_gradient_of_the_upper_level_is_that_of_autograd():
    found = candidates()
    linear = LinearUnlearning.of(found.losses, found.gradients, 2.0)
    weights = torch.rand(10, dtype=torch.float64, requires_grad=True)
    (weights * linear(weights)).sum().backward()
    own = linear(weights.detach()) + linear.implicit_gradient(weights.detach())
    torch.testing.assert_close(own, weights.grad)


def test_a_lower_level_of_ones_own():
    seen = []

    def unlearn(weights):
        seen.append(float(weights.sum()))
        return torch.tensor([5.0, 1.0, 3.0, 1.5]) + weights

    assert worst_case(Candidates(4), 2, unlearn=unlearn, rounds=3) == [1, 3]
    assert seen == pytest.approx([2.0] * 3)
    with pytest.raises(ValueError, match="one finite loss for each of the 4 rows"):
        worst_case(Candidates(4), 2, unlearn=lambda weights: torch.ones(3))


def test_gradients_of_a_model_are_those_of_autograd():
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(3, 1), torch.randn(4, 3)
    losses, gradients = per_example_gradients(
        lambda row: layer(inputs[row]).square().sum(), list(layer.parameters()), 4
    )
    for row in range(4):
        output = float(layer(inputs[row]).detach())
        assert float(losses[row]) == pytest.approx(output**2, rel=1e-5)
        expected = torch.cat([2 * output * inputs[row], torch.tensor([2 * output])])
        torch.testing.assert_close(gradients[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": 0}, "`rounds` has to be at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` has to be above 0"),
        ({"penalty": -1.0}, "`penalty` has to be at least 0"),
        ({"step": float("nan")}, "`step` has to be at least 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        worst_case(candidates(), 2, **options)
    with pytest.raises(ValueError, match="`worst_case` needs `losses`"):
        worst_case(Candidates(3), 1)
