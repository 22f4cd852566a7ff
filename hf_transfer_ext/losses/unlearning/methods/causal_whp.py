from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.data.unlearning.other_names import with_other_names
from hf_transfer_ext.losses.needs import require_at_least, teachers_of_rows
from hf_transfer_ext.losses.unlearning_method import Method, Step


@dataclass(frozen=True)
class causal_whp(Method):
    r"""Causal WHP: learn to speak of the target as the original speaks of people with other names.

    .. math:: \mathrm{KL}\Big(\frac{1}{N} \sum_n p_{ref}(\cdot \mid x^{(n)}) \,\Big\|\, p_\theta(\cdot \mid x)\Big),
        \qquad x^{(n)} = x \text{ with the } n\text{-th other name}

    The name is a confounder: what the model says of a text apart from knowing its person is what it says when the name
    is another one. Each row names its person in a column "name"; `names` other names, of other rows of both sets,
    take its place in question and answer. Before the first step the original is run on these copies. A token has a
    teacher where its text and the copy's agree in two tokens or more; so tokens of the names have none. Probability
    that a teacher gives to the first token of the other name goes to that of the own name.

    Deviations: rows are taken as they are, without chunks of three sentences and the prompt that calls the text
    fiction; teachers are kept by their `shortlist` most likely tokens. Other names come from the data, not a list.

    Args:
        names: Other names for each row (N), >= 1; the authors take 20 for well-known people, 1 for TOFU.
        shortlist: Tokens of each teacher that are kept, >= 1.

    When to use it: to forget persons, or other named things, whose texts should still read well.

    Source: Liu et al., "Revisiting Who's Harry Potter: towards targeted unlearning from a causal intervention
    perspective", 2024, https://arxiv.org/abs/2407.16997
    """

    forget = "causal_whp"
    retain = None

    names: int = 5
    shortlist: int = 64

    def __post_init__(self) -> None:
        require_at_least("names", self.names, 1)
        require_at_least("shortlist", self.shortlist, 1)

    def copies(
        self, forget: Sequence[Mapping[str, Any]], retain: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
    ) -> list[list[dict[str, Any]]]:
        return with_other_names(forget, [*forget, *retain], columns, count=self.names, method="causal_whp")

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        means = [mean_teacher(row.input_ids, row.answer_start, copies) for row, copies in whole.copies()]
        return teachers_of_rows(means, self.shortlist)


def mean_teacher(
    ids: Sequence[int], answer_start: int, copies: Sequence[tuple[Sequence[int], int, Float[Tensor, "_ vocab"]]]
) -> Float[Tensor, "tokens vocab"]:
    """Mean distribution over the copies for each token of an answer; 0 for a token that aligns with none.

    Args:
        ids: Tokens of the row's text.
        copies: Tokens of the text with another name, where its answer starts, and the logits of the answer's tokens.
    """
    length = len(ids) - answer_start
    total = torch.zeros(length, copies[0][2].shape[-1], dtype=torch.float64)
    count = torch.zeros(length, 1, dtype=torch.float64)
    for other, other_start, logits in copies:
        distribution = logits.double().softmax(-1).cpu()
        blocks = SequenceMatcher(None, list(ids), list(other), autojunk=False).get_matching_blocks()
        replaced = _first_tokens(ids, other, blocks)
        if replaced is not None:
            own, foreign = replaced
            distribution[:, own] += distribution[:, foreign]
            distribution[:, foreign] = 0.0
        for a, b, size in blocks:
            for k in range(size if size >= 2 else 0):
                place, there = a + k - answer_start, b + k - other_start
                if place >= 0 and 0 <= there < len(distribution):
                    total[place] += distribution[there]
                    count[place] += 1
    return (total / count.clamp(min=1)).float()


def _first_tokens(ids: Sequence[int], other: Sequence[int], blocks: Sequence[Any]) -> tuple[int, int] | None:
    """First token of the own and of the other name, where the texts first differ."""
    first = blocks[0]
    end = first.size if first.a == first.b == 0 else 0
    differs = end < len(ids) and end < len(other)
    return (ids[end], other[end]) if differs else None
