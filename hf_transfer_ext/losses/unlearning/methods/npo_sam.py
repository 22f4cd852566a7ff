from __future__ import annotations

from dataclasses import dataclass

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning_method import Gradient, Method, Step, norm, weighted_sum


@dataclass(frozen=True)
class npo_sam(Method):
    r"""NPO at the worst weights nearby (sharpness-aware minimization), so that forgetting survives small changes.

    .. math:: \nabla L_f(\theta + \epsilon) + \nabla L_r(\theta), \qquad
        \epsilon = \rho \frac{\nabla L_f(\theta)}{\lVert \nabla L_f(\theta) \rVert}

    The norm is taken over all trained parameters. A step reads the forget batch twice and keeps up to three gradients
    beside the model's own. With an adapter, only the adapter's weights are moved.

    Args:
        rho: How far the weights are moved, as a Euclidean distance, >= 0; 0 is `npo`.

    When to use it: where the model may be fine-tuned or quantized afterwards and must not relearn.

    Source: Fan et al., "Towards LLM unlearning resilient to relearning attacks: a sharpness-aware minimization
    perspective and beyond", 2025, https://arxiv.org/abs/2502.05374
    """

    forget = "npo"
    retain = "retain_nll"

    rho: float = 0.01

    def __post_init__(self) -> None:
        require_at_least("rho", self.rho, 0)

    def gradient(self, step: Step) -> Gradient:
        forget = step.gradient("forget")
        length = norm(forget)
        move = [self.rho * g / length if length > 0 else g for g in forget]
        with step.moved(move):
            sharp = step.gradient("forget")
        return weighted_sum(step, sharp, step.gradient("retain"))
