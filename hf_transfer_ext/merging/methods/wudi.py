"""WUDI: optimize a combined change that does not interfere with any model on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.spectral import add_mean
from hf_transfer_ext.merging.method import Promises, merge_method
from hf_transfer_ext.merging.types import Coefficient


@merge_method(unit="matrix", promises=Promises(alone={}))
def wudi(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    iterations: int = 300,
    learning_rate: float = 1e-5,
    lambda_: Coefficient = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""Start from the sum of the changes, and minimize its interference with each change with Adam.

    .. math::
        \theta = \theta_0 + \lambda t, \quad
        t \approx \arg\min_t \sum_i \frac{\lVert (t - t_i) \, t_i^T \rVert_F^2}{\lVert t_i \rVert_F^2}

    The rows of t_i approximately span the inputs that model i was trained on, so with a small loss the merged matrix
    behaves like model i on these inputs. Adam uses betas of 0.9 and 0.999 and an epsilon of 1e-8.

    When to use it: for fine-tunes of different tasks without any data, where minutes of optimization per model are
    at hand.

    Args:
        iterations: Number of Adam steps; 0 gives the sum of the changes. The rows of embeddings are tokens and are not
            multiplied by inputs: `[{filter: embed_tokens, value: 0}, {value: 300}]` only sums them.
        learning_rate: Learning rate of Adam, in units of the weights: an element moves by at most iterations *
            learning_rate.
        lambda_: Scale of the combined change (`lambda` in YAML); the paper has none, which corresponds to 1.

    Returns:
        The merged weights. Tensors that are not matrices get the mean change. Gradients treat the part that Adam adds
        to the sum as constant.

    Deviations: none. The gradient is computed as 2 (d G + R) for t = sum_i t_i + d, with G_i = t_i^T t_i / |t_i|^2,
    G = sum_i G_i and R = sum_i (sum_{j != i} t_j) G_i: a step costs one product for any number of models, and the
    gradient of changes that do not interfere is exactly 0.

    Source: WUDI-Merging, Cheng et al. 2025, https://arxiv.org/abs/2503.08099
    """
    changes = [model - base for model in models]
    if base.dim() != 2:
        return add_mean(base, changes, lambda_)
    total = sum(changes[1:], changes[0])
    gram, disturbance = base.new_zeros(base.shape[1], base.shape[1]), torch.zeros_like(base)
    fixed = [change.detach() for change in changes]
    for i, change in enumerate(fixed):
        energy = float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
        own = (change.T @ change).div_(energy or 1.0)
        gram += own
        others = [other for j, other in enumerate(fixed) if j != i]
        disturbance += sum(others, torch.zeros_like(base)) @ own
    drift = torch.zeros_like(base)
    optimizer = torch.optim.Adam([drift], lr=learning_rate, foreach=False)
    for _ in range(int(iterations)):
        drift.grad = torch.addmm(disturbance, drift, gram, beta=2, alpha=2)
        optimizer.step()
    return base + lambda_ * (total + drift)
