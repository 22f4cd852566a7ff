r"""The rule by which every divergence gets its gradient without autograd, and what a divergence states for it.

For D(q, p) with student probabilities :math:`q = \mathrm{softmax}(z / T)`, whatever D is,

.. math:: \frac{\partial D}{\partial z_v} = \frac{1}{T} \Big( s_v - q_v \sum_w s_w \Big),
          \qquad s_v = q_v \frac{\partial D}{\partial q_v}.

A divergence therefore states its value and its *slope* s, once, for any number of rows. `@fused_by(slope)` on the
formula ties the two together. A formula without a slope works all the same: autograd then differentiates it, a few
rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "rows vocab"]
PerRow = Float[Tensor, " rows"]
#: (log q, log p, **options) -> (D for each row, s)
Slope = Callable[..., tuple[PerRow, Rows]]
Formula = TypeVar("Formula", bound=Callable)

SLOPES: dict[Callable, Slope] = {}


def fused_by(slope: Slope) -> Callable[[Formula], Formula]:
    """Decorator of a divergence on logits: `slope` gives the same value, and s as defined above."""

    def tie(formula: Formula) -> Formula:
        SLOPES[formula] = slope
        return formula

    return tie


def weighted(probabilities: Float[Tensor, "*shape"], values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`probabilities * values` with 0 * (anything, -inf and NaN too) = 0, as in every sum of p log p."""
    return torch.where(probabilities > 0, probabilities * values, 0.0)


def logit_gradient(log_q: Rows, slope: Rows, temperature: float) -> Rows:
    """dD/dz from the slope, by the rule above. Overwrites and returns `slope`."""
    return slope.addcmul_(log_q.exp(), slope.sum(-1, keepdim=True), value=-1.0).div_(temperature)
