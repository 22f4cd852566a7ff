from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.needs import HiddenRows, TokenIds, Tokens, averaged_over


@averaged_over("tokens")
def scar(
    hidden: HiddenRows,
    reference_hidden: HiddenRows,
    targets: TokenIds,
    cluster_centers: Float[Tensor, "clusters hidden"],
    cluster_tokens: Int[Tensor, " clusters"],
    whitening: Float[Tensor, "hidden hidden"],
) -> Tokens:
    r"""Pull hidden states of the forget set to the nearest cluster that predicts another token.

    .. math:: \sqrt{(\tilde h - \tilde\mu_k)^T \Sigma^{-1} (\tilde h - \tilde\mu_k)}, \qquad
        k = \arg\min_{j: v_j \ne y} d(\tilde h^{ref}, \tilde\mu_j)

    Hidden states are bent and scaled to length 1 (`bent`); centers come bent already. The cluster of each token is
    the nearest one under the reference, so it stays the same throughout. The method `scar` computes the clusters.

    Returns:
        Mahalanobis distance of each token, >= 0.

    Source: Bonato et al., "Is retain set all you need in machine unlearning?" (SCAR), 2024, section 3,
    https://arxiv.org/abs/2404.12922
    """
    centers = cluster_centers @ whitening
    with torch.no_grad():
        distances = torch.cdist(bent(reference_hidden) @ whitening, centers)
        own = cluster_tokens[None] == targets[:, None]
        nearest = distances.masked_fill(own, torch.inf).argmin(-1)
    away = bent(hidden) @ whitening - centers[nearest]
    return (away.square().sum(-1) + 1e-12).sqrt()


def bent(hidden: HiddenRows) -> HiddenRows:
    r"""Tukey's power of one half on values of any sign, then scaled to length 1.

    .. math:: x \cdot (|x| + \epsilon)^{-1/2}, \qquad \epsilon = 10^{-3} \text{ of the root mean square of } x

    The authors' features are positive, where it is the plain root; epsilon bounds the slope at 0.
    """
    size = hidden.detach().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    x = hidden / size
    powered = x * (x.abs() + 1e-3).rsqrt()
    return powered / powered.norm(dim=-1, keepdim=True).clamp(min=1e-12)
