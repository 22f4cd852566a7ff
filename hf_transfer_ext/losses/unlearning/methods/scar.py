from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning.scar import bent
from hf_transfer_ext.losses.unlearning_method import Method, Step


@dataclass(frozen=True)
class scar(Method):
    r"""SCAR: hidden states to forget move to the nearest wrong cluster; any other text holds the model in place.

    .. math:: d_{\Sigma}(\tilde h^f, \tilde\mu_k) + 5\, \mathrm{JSD}(p^o, p_{ref}^o)

    No retain set is needed: give as `retain_dataset` any text that has nothing to do with the forget set, such as
    public articles. The clusters are made from it once, before the first step: the mean hidden state, under the
    original model, of all tokens that predict the same next token.

    Deviations, as a language model has a class for each token of its vocabulary: the clusters come from the other
    text instead of stored statistics of the training set; they have one covariance in common; and powers are taken of
    values of any sign. The forgotten class's logit is not masked. The form that has no forget set either (self-forget)
    is not here.

    Args:
        clusters: Most clusters, the most frequent tokens first, >= 2.
        least: Tokens that make a cluster, >= 1.
        shrinkage: How far the covariance is shrunk, twice, to its mean variance and mean covariance, >= 0.

    When to use it: where the data to retain is not at hand any more. Set `hidden_layer`.

    Source: Bonato et al., "Is retain set all you need in machine unlearning? Restoring performance of unlearned
    models with out-of-distribution images" (SCAR), 2024, section 3, https://arxiv.org/abs/2404.12922
    """

    forget = "scar"
    retain = "retain_jsd"
    alpha = 5.0
    requires_retain = True

    clusters: int = 256
    least: int = 3
    shrinkage: float = 3.0

    def __post_init__(self) -> None:
        require_at_least("clusters", self.clusters, 2)
        require_at_least("least", self.least, 1)
        require_at_least("shrinkage", self.shrinkage, 0)

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        states, tokens = [], []
        with torch.no_grad():
            for found in whole.answers("retain", at_once=8):
                states.append(bent(found.kept("hidden").float()))
                tokens.append(found.targets)
        x, of_token = torch.cat(states), torch.cat(tokens)
        ids, cluster, counts = of_token.unique(return_inverse=True, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        chosen = order[counts[order] >= self.least][: self.clusters]
        if len(chosen) < 2:
            raise ValueError(
                f"'scar' makes a cluster of every token that comes {self.least} times or more in the retain set's "
                f"{len(x)} tokens, and found {len(chosen)}; it needs 2. Give more text, or lower its option `least`."
            )
        sums = x.new_zeros(len(ids), x.shape[1]).index_add(0, cluster, x)
        centers = sums / counts[:, None]
        inside = torch.isin(cluster, chosen)
        away = (x - centers[cluster])[inside].double()
        whitening = whitening_of(away.T @ away / len(away), self.shrinkage)
        return {
            "cluster_centers": centers[chosen],
            "cluster_tokens": ids[chosen],
            "whitening": whitening.to(x),
        }


def whitening_of(covariance: Float[Tensor, "hidden hidden"], shrinkage: float) -> Float[Tensor, "hidden hidden"]:
    r"""Symmetric root of the pseudo-inverse of a covariance that is shrunk twice and scaled to a unit diagonal.

    .. math:: \Sigma \leftarrow \Sigma + \gamma \bar v\, I + \gamma \bar c\, (1 - I)

    with the mean variance and the mean covariance (off the diagonal) of what is shrunk.
    """
    size = len(covariance)
    eye = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    for _ in range(2):
        variance = covariance.diagonal().mean()
        between = (covariance.sum() - covariance.diagonal().sum()) / max(1, size * (size - 1))
        covariance = covariance + shrinkage * (variance * eye + between * (1 - eye))
    deviation = covariance.diagonal().clamp(min=1e-300).sqrt()
    values, vectors = torch.linalg.eigh(covariance / torch.outer(deviation, deviation))
    kept = values > size * torch.finfo(values.dtype).eps * values.abs().max()
    roots = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    return (vectors * roots) @ vectors.T
