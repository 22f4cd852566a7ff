"""Arcee Fusion's importance: how far an element moved, times how much its row changed as a distribution."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.selection import order_statistics
from hf_transfer_ext.merging.method import Pieces, gives

Rows = Float[Tensor, "rows columns"]


def importance_of(base: Rows, model: Rows) -> Rows:
    """|theta_1 - theta_0| * KL(softmax(theta_1) || softmax(theta_0)), the softmax over each row, plus 1e-8."""
    new, old = model.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    divergence = (new * (new / old).log()).sum(-1, keepdim=True)
    return (model - base).abs_().mul_(divergence)


@gives("threshold")
def outstanding(pieces: Pieces, **options: Any) -> dict[str, Any]:
    """Median plus one and a half interquartile ranges of the importance."""
    ranks = [int(share * (pieces.numel - 1)) for share in (0.25, 0.5, 0.75)]
    low, middle, high = order_statistics(pieces, _importances, ranks)[0]
    return {"threshold": middle + 1.5 * (high - low)}


def _importances(base: Tensor | None, models: list[Tensor]) -> list[Tensor]:
    if base is None:
        raise ValueError("`arcee_fusion` needs a base model.")
    flat = base.reshape(-1, base.shape[-1]) if base.dim() else base.reshape(1, 1)
    return [importance_of(flat, models[0].reshape(flat.shape))]
