"""Worst case: the rows that are hardest to forget, by bilevel optimization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.data.candidates import Candidates, largest


def onto_simplex(values: Float[Tensor, " rows"], count: int) -> Float[Tensor, " rows"]:
    """The nearest w with 0 <= w <= 1 and sum w = count: clip(values - t), with t found by bisection."""
    low, high = float(values.min()) - 1.0, float(values.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((values - middle).clamp(0, 1).sum()) > count else (low, middle)
    return (values - (low + high) / 2).clamp(0, 1)


@dataclass(frozen=True)
class LinearUnlearning:
    r"""The losses after one step of gradient difference from the original model, to first order.

    The step ascends on what is forgotten and descends on the rest, so a row has the sign 1 - 2 w:

    .. math:: \theta(w) = \theta_0 - \frac{\eta}{n} \sum_j (1 - 2 w_j) g_j, \qquad
        \ell_i(w) = \ell_i + g_i \cdot (\theta(w) - \theta_0)

    Args:
        losses: ell_i.
        products: g_i . g_j.
        step: eta.
    """

    losses: Float[Tensor, " rows"]
    products: Float[Tensor, "rows rows"]
    step: float

    @classmethod
    def of(
        cls, losses: Float[Tensor, " rows"], gradients: Float[Tensor, "rows parameters"], step: float
    ) -> LinearUnlearning:
        rows = gradients.double()
        return cls(losses.double(), rows @ rows.T, step)

    def __call__(self, weights: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        return self.losses - self.step / len(self.losses) * (self.products @ (1 - 2 * weights.double()))

    def implicit_gradient(self, weights: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """How the upper level changes with w through theta(w): 2 eta / n times the products with w."""
        return 2 * self.step / len(self.losses) * (self.products @ weights)

    @property
    def smoothness(self) -> float:
        """Largest curvature of the upper level, without its penalty."""
        largest_product = float(torch.linalg.eigvalsh(self.products)[-1].clamp(min=0))
        return 4 * self.step / len(self.losses) * largest_product


def worst_case(
    candidates: Candidates,
    count: int,
    *,
    rounds: int = 100,
    learning_rate: float | None = None,
    penalty: float = 0.0,
    step: float = 1.0,
    unlearn: Callable[[Tensor], Tensor] | None = None,
) -> list[int]:
    r"""Choose the rows on which an unlearned model still has the smallest loss: the worst set to be asked to forget.

    Both levels, with a weight w_i between 0 (retain) and 1 (forget) for each row:

    .. math:: \min_w \sum_i w_i \, \ell_i(\theta(w)) + \gamma \lVert w \rVert^2, \quad
        0 \le w \le 1, \sum_i w_i = k, \quad \theta(w) = \text{the model unlearned with } w

    Each of `rounds` rounds unlearns from the original model with the current w (lower level), and takes one projected
    step of the upper level,

    .. math:: w \leftarrow \text{Proj}(w - \alpha (\ell(\theta(w)) + J^T w + 2 \gamma w)), \quad
        J = \partial \ell(\theta(w)) / \partial w

    from w = k / n; at the end the k largest w are the set. The paper trains in the lower level by signs of gradients,
    for which J is 0. Here the lower level is a single step of gradient difference to first order
    (`LinearUnlearning`), which needs the rows' losses and gradients alone; its J is known, and the relaxed problem is
    convex. With `unlearn` the lower level is whatever that does, and J is left out as in the paper.

    When to use it: to test a method where it is weakest; report it beside `random`. The set is the worst one for the
    lower level that found it, which another method may find easy.

    Args:
        count: k, from 1.
        rounds: Rounds of both levels, from 1; the paper has 20.
        learning_rate: alpha of the upper level, above 0. By default one over the largest curvature for the linear
            lower level, with which the rounds converge, and the paper's 0.01 for `unlearn`.
        penalty: gamma, from 0; spreads the weights.
        step: eta of the linear lower level, from 0; at 0 the rows with the smallest losses are chosen.
        unlearn: Weights of all rows -> the losses of a model that was really unlearned with them, from the original.
            Replaces the linear lower level; `gradients` are then not needed.

    Returns:
        Places of the rows, ascending.

    Source: Challenging forgets: unveiling the worst-case forget sets in machine unlearning, Fan et al. 2024,
    https://arxiv.org/abs/2403.07362
    """
    candidates.check_count(count)
    for name, value, least, excluded in (
        ("rounds", rounds, 1, False), ("learning_rate", learning_rate, 0, True), ("penalty", penalty, 0, False),
        ("step", step, 0, False),
    ):  # fmt: skip
        if value is not None and (not value >= least or (excluded and value == least)):
            raise ValueError(f"`{name}` has to be {'above' if excluded else 'at least'} {least}, got {value}.")
    implicit: Callable[[Tensor], Tensor] = torch.zeros_like
    if unlearn is None:
        losses, gradients = candidates.need("losses", "worst_case"), candidates.need("gradients", "worst_case")
        unlearn = linear = LinearUnlearning.of(losses, gradients, step)
        implicit = linear.implicit_gradient
        learning_rate = learning_rate or 1 / ((linear.smoothness + 2 * penalty) or 1.0)
    rate = learning_rate or 0.01
    weights = torch.full((candidates.rows,), count / candidates.rows, dtype=torch.float64)
    for _ in range(rounds):
        found = unlearn(weights.clone()).double()
        if found.shape != weights.shape or not torch.isfinite(found).all():
            raise ValueError(
                f"`unlearn` has to give one finite loss for each of the {candidates.rows} rows, got the shape "
                f"{list(found.shape)}{'' if torch.isfinite(found).all() else ' with NaN or infinity'}."
            )
        weights = onto_simplex(weights - rate * (found + implicit(weights) + 2 * penalty * weights), count)
    return largest(weights, count)
