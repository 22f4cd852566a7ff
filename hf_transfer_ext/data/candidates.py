"""What a selection is: which rows of a data set to take, by what a model makes of them.

A selection method is a function `method(candidates, count, **options) -> rows`, the places of `count` rows in
ascending order. It works on numbers alone, so whoever calls it decides which model they come from and how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The rows to choose from, by number.

    Args:
        rows: How many there are.
        losses: Loss of the model on each row.
        gradients: Gradient of each row's loss (`per_example_gradients`).
        features: A vector for each row: an embedding, a mean hidden state, or the gradient again.
    """

    rows: int
    losses: Float[Tensor, " rows"] | None = None
    gradients: Float[Tensor, "rows parameters"] | None = None
    features: Float[Tensor, "rows features"] | None = None

    def __post_init__(self) -> None:
        for name in ("losses", "gradients", "features"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != self.rows:
                raise ValueError(f"`{name}` has {len(values)} rows, and there are {self.rows} candidates.")
            if not torch.isfinite(values).all():
                raise ValueError(f"`{name}` holds NaN or infinity. Leave those rows out, or fix the model.")

    def need(self, name: str, method: str) -> Any:
        """A field that a method cannot do without."""
        if getattr(self, name) is None:
            raise ValueError(f"The selection `{method}` needs `{name}` of the candidates.")
        return getattr(self, name)

    def check_count(self, count: int) -> None:
        """Refuse to choose none, or more rows than there are."""
        if not 1 <= count <= self.rows:
            raise ValueError(f"From {self.rows} candidates 1 to {self.rows} rows can be chosen, got {count}.")


def largest(scores: Float[Tensor, " rows"], count: int) -> list[int]:
    """The places of the `count` largest scores, in ascending order; of equal ones the first."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())


def per_example_gradients(
    loss_of: Callable[[int], Tensor], parameters: Sequence[Tensor], rows: int
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows parameters"]]:
    """Loss and flat gradient of each row, one backward pass for each.

    Args:
        loss_of: The place of a row -> its loss, with a gradient.
        parameters: With respect to which; those of an adapter or of one layer keep the gradients small.
        rows: How many rows there are.
    """
    losses, gradients = [], []
    for row in range(rows):
        loss = loss_of(row)
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        flat = [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, parameters, strict=True)]
        losses.append(loss.detach().float().reshape(()))
        gradients.append(torch.cat(flat).float())
    return torch.stack(losses), torch.stack(gradients)
