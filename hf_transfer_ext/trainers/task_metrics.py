"""Measurements of task models, each with its interval over the rows of the data: shares, F1, rank correlation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import interval_of

Sums = Float[np.ndarray, " rows"]
PerRow = Shaped[np.ndarray, " rows"]
Counts = Int[np.ndarray, "rows classes"]

#: Pairs of texts that all resamples of `pair_spearman` together may rank; beyond it there are fewer resamples.
PAIRS_TO_RANK = 2 * 10**8


def measured(
    name: str,
    statistic: Callable[..., float],
    arrays: Sequence[np.ndarray],
    unit: str,
    higher_is_better: bool,
    examples: int,
    dataset: str | None = None,
    *,
    resamples: int = 1000,
) -> list[Measurement]:
    """A statistic of all rows, with its 95 % bootstrap interval.

    Args:
        statistic: Function of the arrays.
        arrays: One entry for each row of the data. Rows are resampled whole: the tokens of a text are not independent.
        examples: How many items (texts, words, tokens) the value is about.

    Returns:
        One measurement; none where there are no rows. Its interval is None for a single row, and where the statistic
        is undefined in some resamples, such as a correlation when all drawn values are equal.
    """
    if not len(arrays[0]):
        return []
    found = interval_of(statistic, [arrays], resamples=resamples)
    interval = found if found is not None and np.isfinite(found).all() else None
    return [Measurement(name, statistic(*arrays), unit, higher_is_better, examples, interval, dataset)]


def ratio(
    name: str,
    sums: PerRow,
    counts: PerRow,
    dataset: str | None = None,
    *,
    unit: str = "share",
    higher_is_better: bool = True,
) -> list[Measurement]:
    """A mean over items, by default the share that is right; none where there are no items.

    Args:
        sums: Sum over the items of each row.
        counts: Number of items in each row; rows without items are left out.
    """
    has_items = counts > 0
    arrays = [sums[has_items].astype(np.float64), counts[has_items].astype(np.float64)]
    total = int(counts.sum())
    return measured(name, quotient, arrays, unit, higher_is_better, total, dataset)


def quotient(sums: Sums, counts: Sums) -> float:
    """The mean over the items of all rows."""
    return float(sums.sum() / counts.sum())


def sums_by_row(values: Tensor, row: Int[Tensor, " items"], rows: int) -> Sums:
    """Sum of the values of the items in each row.

    Args:
        values: One for each item.
        row: Index of the row that each item belongs to.
        rows: Number of rows.
    """
    return torch.bincount(row.cpu(), weights=values.double().cpu(), minlength=rows).numpy()


# ---- F1 ----


def label_counts(
    predicted: Int[Tensor, " items"],
    labels: Int[Tensor, " items"],
    row: Int[Tensor, " items"],
    rows: int,
    classes: int,
) -> tuple[Counts, Counts]:
    """For each row and label: how often it is predicted correctly, and how often it occurs plus is predicted."""

    def count(which: Tensor, of: Tensor) -> np.ndarray:
        return torch.bincount(which * classes + of, minlength=rows * classes).view(rows, classes).numpy()

    right = predicted == labels
    return count(row[right], labels[right]), count(row, labels) + count(row, predicted)


def macro_f1(hits: Counts, totals: Counts) -> float:
    r"""Mean of F1, :math:`2 tp / (2 tp + fp + fn)`, over the labels that occur or are predicted; NaN without any.

    Args:
        hits: How often each label is predicted correctly in each row.
        totals: How often it occurs plus how often it is predicted.
    """
    hit, total = hits.sum(0), totals.sum(0)
    return float((2.0 * hit[total > 0] / total[total > 0]).mean()) if total.any() else float("nan")


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Entities in the tags of one text (IOB1, IOB2): first word, word behind the last one, type.

    As CoNLL's own script does it, a tag `I-X` behind another type starts an entity.
    """
    found, start = set(), -1
    kind = ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((start, place, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = place, name
    return found


def entity_counts(predicted: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """For each text: entities that are right in borders and type, and entities predicted plus entities present."""
    sides = [(entities(own), entities(other)) for own, other in zip(predicted, gold, strict=True)]
    hits = np.array([len(found & wanted) for found, wanted in sides])
    return hits, np.array([len(found) + len(wanted) for found, wanted in sides])


def entity_f1(hits: np.ndarray, totals: np.ndarray) -> float:
    """F1 of whole entities over all texts, from `entity_counts`; 0 without entities.

    Source: CoNLL-2003, Tjong Kim Sang and De Meulder, https://aclanthology.org/W03-0419
    """
    return float(2 * hits.sum() / max(totals.sum(), 1))


# ---- Rank correlation ----


def places_of(values: np.ndarray) -> np.ndarray:
    """The place of each value among the sorted distinct values: 0, 1, ..."""
    return np.unique(values, return_inverse=True)[1].reshape(values.shape)


def spearman(places: np.ndarray, others: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Correlation of the ranks, equal values sharing their mean rank; NaN where one side is constant.

    Args:
        places: From `places_of` of the values, so that resamples need no sorting.
        weights: How often each item counts; once by default.
    """
    weights = np.ones(len(places)) if weights is None else weights
    if not weights.any():
        return float("nan")
    deviations = []
    for side in (places, others):
        counts = np.bincount(side, weights=weights)
        ranks = (counts.cumsum() - (counts - 1) / 2)[side]
        deviations.append(ranks - np.average(ranks, weights=weights))
    one, two = deviations
    scale = np.sqrt((weights * one * one).sum() * (weights * two * two).sum())
    return float((weights * one * two).sum() / scale) if scale > 0 else float("nan")


def row_spearman(
    name: str, values: Float[Tensor, " rows"], others: Float[Tensor, " rows"], dataset: str | None = None
) -> list[Measurement]:
    """Rank correlation of two values of each row."""
    arrays = [places_of(side.double().numpy()) for side in (values, others)]
    return measured(name, spearman, arrays, "correlation", True, len(values), dataset)


def pair_spearman(
    name: str, values: Float[Tensor, "rows rows"], others: Float[Tensor, "rows rows"], dataset: str | None = None
) -> list[Measurement]:
    """Rank correlation of two values of each pair of different rows.

    Rows are resampled, and a pair counts as often as both of its rows together; pairs of a row with itself do not
    count. All resamples together rank at most `PAIRS_TO_RANK` pairs, but there are at least 100.
    """
    count = len(values)
    first, second = np.triu_indices(count, 1)
    one, two = (places_of(side.double().numpy()[first, second]) for side in (values, others))

    def statistic(drawn: np.ndarray) -> float:
        times = np.bincount(drawn, minlength=count).astype(np.float64)
        return spearman(one, two, times[first] * times[second])

    resamples = max(100, min(1000, PAIRS_TO_RANK // max(len(first), 1)))
    return measured(name, statistic, [np.arange(count)], "correlation", True, count, dataset, resamples=resamples)


def kl_of(
    teacher_logits: Float[Tensor, "rows classes"], logits: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """KL(reference || model) of each row, in nats."""
    log_p, log_q = teacher_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
