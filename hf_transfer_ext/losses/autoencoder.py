"""A small variational autoencoder of hidden states: which states look like those of a set, without any label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

States = Float[Tensor, "tokens hidden"]

#: Widths of the hidden layers, and of the code.
SIZES = (128, 32, 8)
#: Names of the linear layers, in their order; `code_deviation` is beside `code`.
_LAYERS = ("in", "down", "code", "code_deviation", "up", "out_wide", "out")


def fitted(
    hidden: States, name: str, *, sizes: tuple[int, int, int] = SIZES, steps: int = 300, rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    r"""Train an autoencoder on hidden states.

    .. math:: \frac{1}{d} \lVert x - \hat x(\mu + \sigma \epsilon) \rVert^2
        + \frac{1}{d} \mathrm{KL}(\mathcal N(\mu, \sigma^2) \| \mathcal N(0, 1))

    States are first scaled by one number, so that their mean square is 1. The encoder has layers of d, 128, 32 and 8
    units, the decoder the same in reverse; its end is linear, as hidden states have any sign.

    Args:
        hidden: What it learns; a batch of at most 256 states is drawn in each step.
        name: Of the set; put before the names of the tensors.
        sizes: Widths of the hidden layers, and of the code.
        steps: Steps of Adam, >= 1.
        rate: Its learning rate.
        seed: Of the first weights, the batches and the noise.

    Returns:
        Name -> tensor, for `rebuilt_by`.

    Raises:
        ValueError: There are no hidden states.
    """
    if not len(hidden):
        raise ValueError(f"There are no hidden states of the {name} set to fit an autoencoder to.")
    generator = torch.Generator().manual_seed(seed)
    x = hidden.detach().float()
    scale = x.square().mean().sqrt().clamp(min=1e-12)
    x = x / scale
    wide, middle, code = sizes
    shapes = zip(
        _LAYERS,
        [(x.shape[1], wide), (wide, middle), (middle, code), (middle, code), (code, middle), (middle, wide),
         (wide, x.shape[1])],
        strict=True,
    )  # fmt: skip
    weights = {f"{name}_scale": scale}
    for layer, (inputs, outputs) in shapes:
        drawn = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weights[f"{name}_{layer}"] = drawn.to(x).requires_grad_(True)
        weights[f"{name}_{layer}_bias"] = torch.zeros(outputs).to(x).requires_grad_(True)
    optimizer = torch.optim.Adam([w for w in weights.values() if w.requires_grad], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(len(x), (min(256, len(x)),), generator=generator).to(x.device)
            mean, log_deviation = _encoded(x[chosen], weights, name)
            noise = torch.randn(mean.shape, generator=generator).to(x)
            found = _decoded(mean + log_deviation.exp() * noise, weights, name)
            kl = (mean.square() + (2 * log_deviation).exp() - 1 - 2 * log_deviation).sum(-1) / 2
            loss = ((x[chosen] - found).square().sum(-1) + kl).mean() / x.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {key: weight.detach() for key, weight in weights.items()}


def rebuilt_by(hidden: States, weights: Mapping[str, Tensor], name: str) -> States:
    """Hidden states as the autoencoder of a set rebuilds them from their mean code.

    Raises:
        ValueError: No autoencoder of this set was fitted.
    """
    if f"{name}_scale" not in weights:
        raise ValueError(f"No autoencoder was fitted to the {name} set. Choose a method that does so (laf).")
    scale = weights[f"{name}_scale"].to(hidden)
    mean, _ = _encoded(hidden / scale, weights, name)
    return _decoded(mean, weights, name) * scale


def _encoded(x: States, weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the deviation of the code."""
    for layer in ("in", "down"):
        x = torch.nn.functional.gelu(_linear(x, weights, f"{name}_{layer}"))
    return _linear(x, weights, f"{name}_code"), _linear(x, weights, f"{name}_code_deviation").clamp(-5.0, 2.0)


def _decoded(code: Tensor, weights: Mapping[str, Tensor], name: str) -> States:
    for layer in ("up", "out_wide"):
        code = torch.nn.functional.gelu(_linear(code, weights, f"{name}_{layer}"))
    return _linear(code, weights, f"{name}_out")


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return torch.nn.functional.linear(x, weights[name].to(x), weights[f"{name}_bias"].to(x))
