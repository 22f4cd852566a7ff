"""Magnitude pruning: zero the largest weights behind the inputs that the forget set uses most of all."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_transfer_ext.edits.method import Edited, edit_method
from hf_transfer_ext.edits.subject import Subject
from hf_transfer_ext.merging.method import Interval

#: Added to both norms, so that a feature that neither set uses has the ratio 1.
FLOOR = 1e-6


def forget_inputs(
    forget_norms: Float[Tensor, " inputs"], retain_norms: Float[Tensor, " inputs"], share: float
) -> Bool[Tensor, " inputs"]:
    """The input features that the forget set uses and the retain set does not.

    Of n features the round(share n) with the largest ratio (forget + floor) / (retain + floor) of their root mean
    squares; none whose ratio is not above 1.
    """
    ratio = (forget_norms.double() + FLOOR) / (retain_norms.double() + FLOOR)
    chosen = torch.zeros(len(ratio), dtype=torch.bool)
    chosen[torch.argsort(ratio, descending=True, stable=True)[: round(share * len(ratio))]] = True
    return chosen & (ratio > 1)


def prune_largest(
    weight: Float[Tensor, "outputs inputs"], columns: Bool[Tensor, " inputs"], *, share: float
) -> Float[Tensor, "outputs inputs"]:
    """Zero the round(share m) largest of the m weights in the given columns, by magnitude; ties go by place."""
    pruned = weight.clone()
    inside = weight[:, columns]
    flat = inside.reshape(-1)
    gone = torch.argsort(flat.abs(), descending=True, stable=True)[: round(share * flat.numel())]
    flat = flat.clone()
    flat[gone] = 0.0
    pruned[:, columns] = flat.reshape(inside.shape)
    return pruned


@edit_method(needs=("forget", "retain"), ranges={"inputs": Interval(0, 1), "share": Interval(0, 1)})
def magnitude_pruning(subject: Subject, *, inputs: float = 0.02, share: float = 1.0) -> Edited:
    r"""Zero the largest weights that read features which the forget set uses and the retain set does not.

    In every linear layer but the head, with f_j and r_j the root mean square of input j over the positions that
    predict answers of the forget and of the retain set:

    .. math:: J = \text{the } \textit{inputs} \text{ share of } j \text{ with the largest } f_j / r_j > 1, \qquad
        W'_{ij} = 0 \text{ for the } \textit{share} \text{ largest } |W_{ij}|, j \in J

    Magnitude alone says nothing about data, so the data chooses the columns and the magnitude the weights in them.
    With `share` 1 whole columns go, which is the selective pruning of neurons.

    When to use it: a topic that some neurons serve almost alone, in a model of some size. Do not use it for single
    facts: their neurons serve others, too (compare `wanda`, which looks at each weight).

    Args:
        inputs: Share of each layer's input features, 0 to 1.
        share: Share of the weights behind these features, 0 (nothing changes) to 1.

    Returns:
        Jobs for the layers with a chosen feature. `found` counts the features.

    Source: magnitude: Han et al. 2015, https://arxiv.org/abs/1506.02626; the ratio of activations over the two sets:
    Dissecting language models: machine unlearning via selective pruning, Pochinkov and Schoots 2024,
    https://arxiv.org/abs/2403.01267
    """
    if inputs == 0 or share == 0:
        return Edited()
    forget, retain = subject.input_norms(subject.forget), subject.input_norms(subject.retain)
    jobs, features = {}, {}
    for layer in subject.linears:
        if layer.module not in forget or layer.module not in retain:
            continue  # a layer that the model's own forward does not call
        columns = forget_inputs(forget[layer.module], retain[layer.module], inputs)
        if columns.any():
            edit = layer.rows_are_outputs(partial(prune_largest, columns=columns, share=share))
            jobs[layer.tensor] = subject.edit(layer.tensor, edit)
            features[layer.module] = int(columns.sum())
    return Edited(jobs, found={"features": features})
