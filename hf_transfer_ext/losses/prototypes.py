"""Class prototypes: a mean feature of each class, labels by the nearest one, classes aligned across languages."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_transfer_ext.tensors import IGNORE_INDEX


class Prototypes(nn.Module):
    r"""A running mean of the features of each class.

    .. math:: c_k \leftarrow \rho \, c_k + (1 - \rho) \, \frac{1}{n_k} \sum_{i: y_i = k} h_i

    over the classes that occur in a batch, on all processes; the first batch with a class sets its prototype. Set by
    `self_training_weight`, `alignment_weight` and `prototype_rate` in `task_options` of token_classification.

    Args:
        rate: rho, in [0, 1).

    When to use it: labels in one language or domain, and texts without labels in another: a word there learns from the
    class of the nearest prototype.

    Source: ProKD, Ge et al. 2023, https://arxiv.org/abs/2301.08855
    """

    centers: Tensor
    seen: Tensor

    def __init__(self, classes: int, width: int, *, rate: float = 0.9) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must lie in [0, 1), got {rate}.")
        self.rate = rate
        self.register_buffer("centers", torch.zeros(classes, width))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, features: Float[Tensor, "items width"], classes: Int[Tensor, " items"]) -> None:
        """Move the prototypes toward the features of a batch; every process calls it."""
        kinds = len(self.seen)
        sums = torch.zeros_like(self.centers).index_add_(0, classes, features.detach().to(self.centers))
        counts = torch.bincount(classes, minlength=kinds).to(sums)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(counts)
        occurs = counts > 0
        means = sums / counts.clamp(min=1)[:, None]
        moved = torch.where(self.seen[:, None], self.rate * self.centers + (1 - self.rate) * means, means)
        self.centers.copy_(torch.where(occurs[:, None], moved, self.centers))
        self.seen |= occurs

    @torch.no_grad()
    def nearest(self, features: Float[Tensor, "items width"]) -> Int[Tensor, " items"]:
        r"""The likeliest class by :math:`\mathrm{softmax}_k(-|h - c_k|)`; IGNORE_INDEX while no class was seen."""
        if not bool(self.seen.any()):
            return torch.full((len(features),), IGNORE_INDEX, device=features.device)
        distances = torch.cdist(features.detach().to(self.centers), self.centers)
        return distances.masked_fill(~self.seen, torch.inf).argmin(1)


def class_means(
    features: Float[Tensor, "items width"], classes: Int[Tensor, " items"], kinds: int
) -> tuple[Float[Tensor, "kinds width"], Bool[Tensor, " kinds"]]:
    """(mean feature of each class, whether the class occurs); gradients flow to the features."""
    one_of = nn.functional.one_hot(classes, kinds).to(features)
    counts = one_of.sum(0)
    return one_of.T @ features / counts.clamp(min=1)[:, None], counts > 0


def prototype_alignment(
    means: Float[Tensor, "kinds width"],
    occurs: Bool[Tensor, " kinds"],
    others: Prototypes,
    *,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    r"""InfoNCE between the classes of a batch and the prototypes of another language; its positive is the same class.

    .. math:: - \frac{1}{K} \sum_k \log
              \frac{\exp(\cos(m_k, c_k) / \tau)}{\sum_j \exp(\cos(m_k, c_j) / \tau)}

    Args:
        means: m, from `class_means`; carries the gradient.
        others: c; classes that it has not seen yet take no part.
        temperature: tau, > 0.

    When to use it: a model (the teacher, in the paper) whose features of a class are far apart in two languages;
    `alignment_weight` in `task_options` of token_classification sets it.

    Returns:
        Nats per class, >= 0; 0 where no class occurs on both sides.

    Source: ProKD, Ge et al. 2023, https://arxiv.org/abs/2301.08855. The abstract names a contrastive alignment of
    prototypes; similarity and temperature are this package's own choice.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature}.")
    cosines = normalize(means.float(), dim=-1) @ normalize(others.centers.float(), dim=-1).T / temperature
    log_p = cosines.masked_fill(~others.seen, -torch.inf).log_softmax(-1).diagonal()
    both = occurs & others.seen
    return -torch.where(both, log_p, 0.0).sum() / both.sum().clamp(min=1)
