"""Wanda: zero the weights that matter to the forget set and do not matter to the retain set."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_transfer_ext.edits.method import Edited, edit_method
from hf_transfer_ext.edits.subject import Subject
from hf_transfer_ext.merging.method import Interval


def top_of_rows(scores: Float[Tensor, "outputs inputs"], share: float) -> Bool[Tensor, "outputs inputs"]:
    """The round(share n) largest of the n scores in each row; ties go by place."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, : round(share * scores.shape[1])]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def prune_difference(
    weight: Float[Tensor, "outputs inputs"],
    forget_norms: Float[Tensor, " inputs"],
    retain_norms: Float[Tensor, " inputs"],
    *,
    share: float,
    protect: float,
) -> Float[Tensor, "outputs inputs"]:
    """Zero the weights in the top `share` of a row by forget score that are not in its top `protect` by retain score.

    The score of a weight is its magnitude times the norm of its input.
    """
    wanted = top_of_rows(weight.abs() * forget_norms, share)
    needed = top_of_rows(weight.abs() * retain_norms, protect)
    return weight.masked_fill(wanted & ~needed, 0.0)


@edit_method(needs=("forget", "retain"), ranges={"share": Interval(0, 1), "protect": Interval(0, 1)})
def wanda(subject: Subject, *, share: float = 0.05, protect: float = 0.1) -> Edited:
    r"""Zero the weights with a high Wanda score on the forget set and not on the retain set.

    Wanda scores a weight by its magnitude times the norm of its input over a data set, and compares the scores within
    one output. With the norms of both sets, in every linear layer but the head:

    .. math:: S^D_{ij} = |W_{ij}| \, \lVert x^D_j \rVert_2, \qquad
        W'_{ij} = 0 \text{ where } S^f_{ij} \in \text{top}_{share}(S^f_i) \text{ and }
        S^r_{ij} \notin \text{top}_{protect}(S^r_i)

    Norms are taken over the positions that predict answer tokens, as root mean squares, so that the sets may differ
    in size.

    When to use it: no training budget, and a retain set that covers what has to stay. Raise `protect` first where
    utility falls. Do not expect it to hold against relearning: the zeros come back when the weights are trained.

    Args:
        share: Share of each output's weights that may go, 0 (nothing changes) to 1.
        protect: Share of each output's weights that stay for the retain set, 0 to 1.

    Returns:
        Jobs for all linear layers but the head.

    Source: A simple and effective pruning approach for large language models, Sun et al. 2023,
    https://arxiv.org/abs/2306.11695; the set difference: Wei et al. 2024, https://arxiv.org/abs/2402.05162
    """
    if share == 0 or protect == 1:
        return Edited()
    forget, retain = subject.input_norms(subject.forget), subject.input_norms(subject.retain)
    jobs = {}
    for layer in subject.linears:
        if layer.module in forget and layer.module in retain:
            norms = {"forget_norms": forget[layer.module], "retain_norms": retain[layer.module]}
            edit = layer.rows_are_outputs(partial(prune_difference, **norms, share=share, protect=protect))
            jobs[layer.tensor] = subject.edit(layer.tensor, edit)
    return Edited(jobs, found={"layers": len(jobs)})
