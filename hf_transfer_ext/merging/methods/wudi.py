"""WUDI: optimize a combined change that does not interfere with any model on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.merging.arithmetic.changes import sum_of
from hf_transfer_ext.merging.arithmetic.spectral import add_mean, sum_of_changes
from hf_transfer_ext.merging.method import Promises, merge_method
from hf_transfer_ext.merging.types import Coefficient, Matrix

#: Rows that take all steps before the next ones do.
ROWS = 512


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
    gradient of changes that do not interfere is exactly 0. The rows of t do not depend on each other, so blocks of
    them take all steps in turn, in the caches of a core.

    Source: WUDI-Merging, Cheng et al. 2025, https://arxiv.org/abs/2503.08099
    """
    if base.dim() != 2:
        return add_mean(base, models, lambda_)
    total = sum_of_changes(base, models)
    grams = [_gram((model - base).detach()) for model in models]
    gram, drift = sum(grams[1:], grams[0]), torch.zeros_like(base)
    for start in range(0, len(base), ROWS):
        part = slice(start, start + ROWS)
        fixed = [(model[part] - base[part]).detach() for model in models]
        disturbance = torch.zeros_like(fixed[0])
        for i, own in enumerate(grams):
            disturbance += sum_of([torch.zeros_like(disturbance), *fixed[:i], *fixed[i + 1 :]]) @ own
        moving = drift[part]
        optimizer = torch.optim.Adam([moving], lr=learning_rate, foreach=False)
        for _ in range(int(iterations)):
            moving.grad = torch.addmm(disturbance, moving, gram, beta=2, alpha=2)
            optimizer.step()
    return base + lambda_ * (total + drift)


def _gram(change: Matrix) -> Float[Tensor, "columns columns"]:
    """t^T t / |t|^2."""
    energy = float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
    return (change.T @ change).div_(energy or 1.0)
