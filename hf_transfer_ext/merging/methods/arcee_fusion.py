"""Arcee Fusion: take only the most important changes from the other model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.selection import order_statistics
from hf_transfer_ext.merging.method import Pieces, gives, merge_method

Rows = Float[Tensor, "rows columns"]


def importance_of(base: Rows, model: Rows) -> Rows:
    """|theta_1 - theta_0| * KL(softmax(theta_1) || softmax(theta_0)), the softmax over each row, plus 1e-8."""
    new, old = model.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    divergence = (new * (new / old).log()).sum(-1, keepdim=True)
    return (model - base).abs() * divergence


@gives("threshold")
def outstanding_importance(pieces: Pieces, **options: Any) -> dict[str, Any]:
    """Median plus one and a half interquartile ranges of the importance."""
    ranks = [int(share * (pieces.numel - 1)) for share in (0.25, 0.5, 0.75)]
    low, middle, high = order_statistics(pieces, _importances, ranks)[0]
    return {"threshold": middle + 1.5 * (high - low)}


def _importances(base: Rows | None, models: list[Rows]) -> list[Tensor]:
    if base is None:
        raise ValueError("`arcee_fusion` needs a base model.")
    return [importance_of(base, models[0])]


@merge_method(unit="row", count=(1, 1), statistics=outstanding_importance)
def arcee_fusion(
    base: Rows,
    models: Sequence[Rows],
    *,
    threshold: float,
) -> Rows:
    r"""Add the elements of the change whose importance exceeds the median by at least 1.5 interquartile ranges.

    .. math::
        I = |\theta_1 - \theta_0| \cdot \mathrm{KL}(\mathrm{softmax}(\theta_1) \| \mathrm{softmax}(\theta_0)), \quad
        \theta = \theta_0 + (\theta_1 - \theta_0) [I \ge \mathrm{median} + 1.5 \, \mathrm{IQR}]

    where the softmax, and therefore the divergence, is computed per row.

    When to use it: to move the few changes of one fine-tune that matter into its base, and leave the rest.

    Args:
        threshold: Smallest importance at which an element is taken.

    Returns:
        The merged weights.

    Deviations: quartiles are exact; mergekit uses a random sample for tensors with more than 10^6 elements.

    Source: Arcee Fusion in mergekit, Goddard et al. 2024, https://arxiv.org/abs/2403.13257
    """
    change = models[0] - base
    return base + change * (importance_of(base, models[0]) >= threshold)
