from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.losses.needs import needs_of, require_at_least
from hf_transfer_ext.losses.unlearning import UNLEARNING_LOSSES
from hf_transfer_ext.losses.unlearning_method import Batch, Gradient, Method, Step, weighted_sum


@dataclass(frozen=True)
class lat(Method):
    r"""Latent adversarial training: forget also where an attack on the hidden states brings the answers back.

    .. math:: \nabla_\theta L_f(\theta, h + \delta^*) + \nabla_\theta L_r(\theta), \qquad
        \delta^* = \arg\min_{\lVert \delta_t \rVert \le \rho \lVert h_t \rVert} \ell_\theta(y \mid h + \delta)

    For each batch, `attack_steps` of normalized gradient descent look for the change of one layer's hidden states,
    bounded at each token t, under which the answers to forget become most likely; then the forget loss is computed
    under it. Each attack step costs a forward and a backward pass.

    Deviations: the authors attack four layers, each by a change of its own and of a fixed length; here it is one
    layer, and the bound is relative to the length of the token's hidden state, so that it fits models of any width.

    Args:
        layer: Whose output is attacked, from 1 to the number of layers; 0 is the one at half of the depth.
        radius: Largest change, as a share of the hidden state's length, >= 0; 0 is `npo`.
        attack_steps: Steps of the attack, >= 1, each as long as 2 * radius / attack_steps.

    When to use it: where attacks on activations, prompts or few-step relearning must not bring answers back.

    Source: Sheshadri et al., "Latent adversarial training improves robustness to persistent harmful behaviors in
    LLMs", 2024, https://arxiv.org/abs/2407.15549
    """

    forget = "npo"
    retain = "retain_nll"

    layer: int = 0
    radius: float = 0.1
    attack_steps: int = 4

    def __post_init__(self) -> None:
        require_at_least("layer", self.layer, 0)
        require_at_least("radius", self.radius, 0)
        require_at_least("attack_steps", self.attack_steps, 1)

    def check(self, config: Any) -> None:
        needs = needs_of(UNLEARNING_LOSSES[config.forget_loss])
        if any(need.keeps == "hidden" for need in needs) and not 0 < self.layer < config.hidden_layer:
            raise ValueError(
                f"{config.forget_loss!r} reads hidden states of layer {config.hidden_layer}, and 'lat' has to "
                f"attack a layer below it: set its `layer` from 1 to {config.hidden_layer - 1}; got {self.layer}."
            )
        if any(need.of_alternative for need in needs):
            raise ValueError(
                f"'lat' attacks the hidden states of the answers to forget, and {config.forget_loss!r} also reads "
                "other answers, at other tokens. Choose a forget loss without alternatives."
            )

    def gradient(self, step: Step) -> Gradient:
        layer = self.layer or max(1, step.layers // 2)
        if layer > step.layers:
            raise ValueError(f"`layer` of 'lat' is {layer}, but the model has {step.layers} layers.")
        forget = step.gradient("forget", lambda batch: self.attacked(batch, layer))
        return weighted_sum(step, forget, step.gradient("retain"))

    @contextmanager
    def attacked(self, batch: Batch, layer: int) -> Iterator[None]:
        """Within the block, the trained model computes under the change that its attack has found."""
        attack = _Attack(self.radius, 2 * self.radius / self.attack_steps)
        for _ in range(self.attack_steps):
            with batch.hidden_states_changed(layer, attack.changed):
                attack.walk(batch.recall())
        with batch.hidden_states_changed(layer, attack.changed):
            yield


class _Attack:
    """The change of the hidden states, as far as it is found.

    Args:
        radius: Largest length of the change at a token, as a share of the length of its hidden state.
        pace: Length of a step, in the same unit.
    """

    def __init__(self, radius: float, pace: float) -> None:
        self.radius, self.pace = radius, pace
        self.change: Tensor | None = None
        self.lengths: Tensor | None = None

    def changed(self, hidden: Tensor) -> Tensor:
        if self.change is None:
            self.lengths = hidden.detach().float().norm(dim=-1, keepdim=True)
            self.change = torch.zeros_like(hidden, dtype=torch.float32, requires_grad=True)
        return hidden + self.change.to(hidden.dtype)

    def walk(self, recall: Tensor) -> None:
        """One step of descent on the loss of the answers, back into the ball around 0 at each token."""
        if self.change is None or self.lengths is None:
            raise ValueError("The attacked layer took no part in the forward pass.")
        (slope,) = torch.autograd.grad(recall, self.change)
        with torch.no_grad():
            length = slope.norm(dim=-1, keepdim=True)
            walked = self.change - self.pace * self.lengths * torch.where(length > 0, slope / length, 0.0)
            far, bound = walked.norm(dim=-1, keepdim=True), self.radius * self.lengths
            self.change = walked * (bound / far.clamp(min=1e-30)).clamp(max=1.0)
        self.change.requires_grad_(True)
