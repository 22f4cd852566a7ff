from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning_method import Gradient, Method, Step, weighted_sum


@dataclass(frozen=True)
class sure(Method):
    r"""SURE: only the neurons that the forget loss depends on most are trained, so that large steps do little harm.

    .. math:: m \odot (\nabla L_f + \nabla L_r), \qquad
        m_i = 1 \text{ where } \lVert (\nabla L_f(\theta_0))_i \rVert \ge \text{the quantile over all } i

    A neuron i is a row of a trained matrix, or an entry of a trained vector. The mask is made once from the forget
    loss over the whole forget set, and saved in checkpoints. In a new LoRA, whose B is 0, the gradient of A is 0 too:
    rows of B are chosen, and A stays.

    Use a larger learning rate than for `npo`: the authors' point is that only large steps outlast rounding to 4 bits.

    Args:
        quantile: Share of the neurons that stay frozen, from 0 (then it is `npo`) to below 1.

    When to use it: before quantization, at a learning rate at which other methods would lose utility.

    Source: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", 2025, section 5,
    https://arxiv.org/abs/2410.16454
    """

    forget = "npo"
    retain = "retain_nll"

    quantile: float = 0.9

    def __post_init__(self) -> None:
        require_at_least("quantile", self.quantile, 0)
        if self.quantile >= 1:
            raise ValueError(f"`quantile` must be below 1, got {self.quantile}: no neuron would be trained.")

    def check(self, config: Any) -> None:
        if config.weight_decay:
            raise ValueError(
                f"'sure' trains some neurons and holds the others, and weight_decay={config.weight_decay} would "
                "shrink all of them. Set it to 0."
            )

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        strengths = [_by_neuron(g) for g in whole.gradient("forget")]
        ordered = torch.cat(strengths).sort().values
        threshold = ordered[int(self.quantile * len(ordered))]
        return {str(i): (strength >= threshold) & (strength > 0) for i, strength in enumerate(strengths)}

    def gradient(self, step: Step) -> Gradient:
        gradient = weighted_sum(step, step.gradient("forget"), step.gradient("retain"))
        masks = [step.prepared[str(i)] for i in range(len(gradient))]
        return [
            g * mask.reshape(-1, *[1] * (g.dim() - 1)).to(g.dtype) for g, mask in zip(gradient, masks, strict=True)
        ]


def _by_neuron(gradient: Tensor) -> Tensor:
    """Length of each row, in float32."""
    return gradient.float().reshape(len(gradient), -1).norm(dim=-1)
