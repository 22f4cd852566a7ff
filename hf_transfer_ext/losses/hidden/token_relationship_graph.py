from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hf_transfer_ext.losses.layer_reading import reads


@reads("sequences")
def token_relationship_graph(
    student: Float[Tensor, "texts length width"],
    teacher: Float[Tensor, "texts length teacher_width"],
    mask: Bool[Tensor, "texts length"],
    *,
    neighbors: int = 20,
    sigma: float = 0.5,
    local_weight: float = 1.0,
    inner_weight: float = 1.0,
) -> Float[Tensor, "texts length"]:
    r"""How near each token is to its nearest neighbors in the text, and how it relates to all tokens: no projection.

    .. math:: \alpha \, KL(G^T_i \| G^S_i) + \beta \sum_j (R^T_{ij} - R^S_{ij})^2, \quad
              G_i = \mathrm{softmax}_{j \in N(i)} \Big( \frac{-|h_i - h_j|^2}{2 \sigma m_i} \Big), \quad
              R_i = \mathrm{softmax}_j (h_i h_j^T / \sqrt{d})

    N(i) are the k tokens that are nearest to token i in the teacher, the same for both models, and m_i the mean of
    their squared distances in the model itself, so that neither the width nor the scale of its states matters.

    Deviations from the paper: the nodes are the tokens of one text, and not a sample of the batch, so that the loss of
    a text does not depend on its neighbors in the batch; distances are relative to their mean; and the paper's third
    part, a contrast between the tokens of both models, is left out.

    When to use it: a student of another width, where the directions of single states mean nothing, and which tokens
    belong together does; beside a divergence.

    Args:
        student: Hidden states of whole texts.
        teacher: The same of the teacher.
        mask: True at tokens that are not padding.
        neighbors: k, >= 1; fewer in a short text.
        sigma: > 0; a small one looks at the nearest neighbors alone.
        local_weight: alpha, >= 0.
        inner_weight: beta, >= 0.

    Returns:
        For each token, >= 0; 0 at padding and where both relate all tokens alike.

    Raises:
        ValueError: An option is out of its range.

    Source: Knowledge Distillation via Token-level Relationship Graph, Zhang et al. 2023,
    https://arxiv.org/abs/2306.12442
    """
    if neighbors < 1 or not sigma > 0 or local_weight < 0 or inner_weight < 0:
        raise ValueError(
            "token_relationship_graph needs `neighbors` >= 1, `sigma` > 0 and weights >= 0, got "
            f"{neighbors}, {sigma}, {local_weight} and {inner_weight}."
        )
    student, teacher = student.float(), teacher.detach().float()
    other = mask[:, None, :] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    distances = _squared_distances(teacher)
    nearest = distances.masked_fill(~other, torch.inf).topk(min(neighbors, mask.shape[1]), largest=False).indices
    there = other.gather(2, nearest)
    log_p = _graph(distances, nearest, there, sigma)
    log_q = _graph(_squared_distances(student), nearest, there, sigma)
    local = torch.where(there, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    inner = (
        (_relations(student, mask) - _relations(teacher, mask)).square().masked_fill(~mask[:, None, :], 0.0).sum(-1)
    )
    return (local_weight * local + inner_weight * inner).masked_fill(~mask, 0.0)


def _squared_distances(states: Float[Tensor, "texts length width"]) -> Float[Tensor, "texts length length"]:
    norms = states.square().sum(-1)
    return (norms[:, :, None] + norms[:, None, :] - 2 * states @ states.transpose(1, 2)).clamp(min=0.0)


def _graph(
    distances: Float[Tensor, "texts length length"],
    nearest: Int[Tensor, "texts length neighbors"],
    there: Bool[Tensor, "texts length neighbors"],
    sigma: float,
) -> Float[Tensor, "texts length neighbors"]:
    """Log-probabilities over the neighbors of each token; a finite number at those that are not there."""
    own = distances.gather(2, nearest).masked_fill(~there, 0.0)
    mean = own.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    scores = -own / (2 * sigma * mean.clamp(min=torch.finfo(own.dtype).tiny))
    return scores.masked_fill(~there, torch.finfo(own.dtype).min).log_softmax(-1)


def _relations(
    states: Float[Tensor, "texts length width"], mask: Bool[Tensor, "texts length"]
) -> Float[Tensor, "texts length length"]:
    scores = states @ states.transpose(1, 2) / states.shape[-1] ** 0.5
    return scores.masked_fill(~mask[:, None, :], torch.finfo(scores.dtype).min).softmax(-1)
