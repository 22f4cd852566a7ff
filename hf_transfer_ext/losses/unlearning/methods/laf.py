from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_transfer_ext.losses.autoencoder import fitted
from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning_method import Method, Part, Step


@dataclass(frozen=True)
class laf(Method):
    r"""LAF, label-agnostic forgetting: hidden states are moved out of the forget set's density, by no label at all.

    .. math:: S(\hat h^r_{s}, h^r) - S(\hat h^f_{u}, h^f) + \text{contrast}, \qquad S = e^{m / (m + 1)}

    Two variational autoencoders learn, before the first step, how the original's hidden states look on the retain set
    (s) and on the forget set (u). Then hidden states to forget move to where u cannot rebuild them, those to retain
    stay where s can, and a contrast holds the latter's direction and turns the former's.

    Deviations: both losses are minimized together, by one optimizer; the contrast is taken within each answer (see the
    loss). The optional repair with labels at the end is left out: it is a fine-tuning (`train_on_answers`).

    Args:
        steps: Training steps of each autoencoder, >= 1.
        rate: Their learning rate, > 0.

    When to use it: where texts are known but not what is right in them, or representations have to change and not
    just answers. Set `hidden_layer`; the adapter has to reach below it.

    Source: Shen et al., "Label-agnostic forgetting: a supervision-free unlearning in deep models", 2024,
    https://arxiv.org/abs/2404.00506
    """

    forget = "laf"
    retain = "retain_laf"
    requires_retain = True

    steps: int = 300
    rate: float = 1e-3

    def __post_init__(self) -> None:
        require_at_least("steps", self.steps, 1)
        require_at_least("rate", self.rate, 0, strictly=True)

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        parts: tuple[Part, ...] = ("forget", "retain")
        weights: dict[str, Tensor] = {}
        for part in parts:
            with torch.no_grad():
                states = torch.cat([found.kept("hidden") for found in whole.answers(part, at_once=8)])
            weights |= fitted(states, part, steps=self.steps, rate=self.rate)
        return weights
