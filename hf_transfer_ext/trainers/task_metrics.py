"""Measures of classifiers and embedders: F1 by label and by entity, rank correlation, agreement of two models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.measurement import Measurement


def f1_by_label(
    predicted: Int[Tensor, " items"], labels: Int[Tensor, " items"], classes: int
) -> Float[Tensor, " classes"]:
    r"""F1 of each label, :math:`2 tp / (2 tp + fp + fn)`; NaN for a label that neither occurs nor is predicted."""
    hits = torch.bincount(labels[predicted == labels], minlength=classes)
    return 2.0 * hits / (torch.bincount(labels, minlength=classes) + torch.bincount(predicted, minlength=classes))


def f1_of_yes(
    predicted: Int[Tensor, "items classes"], labels: Int[Tensor, "items classes"]
) -> Float[Tensor, " classes"]:
    """F1 of each of several labels at once; NaN for one that neither occurs nor is predicted."""
    return 2.0 * (predicted * labels).sum(0) / (predicted.sum(0) + labels.sum(0))


def macro_f1(scores: Float[Tensor, " classes"]) -> float:
    """Mean of F1 over the labels that occur; NaN without any."""
    return float(scores[~scores.isnan()].mean())


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


def entity_f1(predicted: Iterable[Sequence[str]], gold: Iterable[Sequence[str]]) -> float:
    """F1 of whole entities, right in borders and type, over all texts. Source: CoNLL-2003, Tjong Kim Sang and De
    Meulder, https://aclanthology.org/W03-0419
    """
    hits = wrong = missed = 0
    for own, other in zip(predicted, gold, strict=True):
        found, wanted = entities(own), entities(other)
        hits += len(found & wanted)
        wrong += len(found - wanted)
        missed += len(wanted - found)
    return 2 * hits / max(2 * hits + wrong + missed, 1)


def spearman(values: Float[Tensor, " items"], others: Float[Tensor, " items"]) -> float:
    """Correlation of the ranks, equal values sharing their mean rank; NaN where one side is constant."""
    ranks = torch.stack([_ranks(one.double()) for one in (values, others)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2.0)[places]


def kl_of(teacher_logits: Float[Tensor, "rows classes"], logits: Float[Tensor, "rows classes"]) -> float:
    """Sum over rows of KL(reference || model), in nats."""
    log_p, log_q = teacher_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def share(name: str, hits: int, of: int, dataset: str | None) -> list[Measurement]:
    """A share of items as a measurement; none where there are no items."""
    if of == 0:
        return []
    return [Measurement(name, hits / of, "share", True, of, dataset=dataset)]
