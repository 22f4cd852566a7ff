from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_transfer_ext.losses.unlearning_method import Gradient, Method, Step, weighted_sum


@dataclass(frozen=True)
class prune_first(Method):
    r"""Prune, then unlearn: the smallest weights are set to 0 before the first step, and stay there.

    .. math:: \theta_0 \leftarrow m \odot \theta_0, \qquad m \odot (\nabla L_f + \nabla L_r), \qquad
        m_i = 1 \text{ for the largest } |\theta_i| \text{ of each matrix}

    Vectors (norms, biases) are not pruned. The mask is saved in checkpoints. The reference is the model before
    pruning. It prunes what it trains, so it needs full fine-tuning; a LoRA starts from zeros, and pruning its base is
    an edit of the base.

    Deviation: the authors prune by the largest weights of the whole network, here by those of each matrix.

    Args:
        sparsity: Share of each matrix that is set to 0, from 0 (then it is `npo`) to below 1; 0.5 to 0.95 is common.

    When to use it: where the model is going to be pruned anyway: sparse models forget with less damage.

    Source: Jia et al., "Model sparsity can simplify machine unlearning", 2023, section 4 (prune first, then unlearn),
    https://arxiv.org/abs/2304.04934
    """

    forget = "npo"
    retain = "retain_nll"

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"`sparsity` must be from 0 to below 1, got {self.sparsity}.")

    def prepare(self, whole: Step) -> dict[str, Tensor]:
        if not all(bool(p.any()) for p in whole.parameters if p.dim() > 1):
            raise ValueError(
                "'prune_first' sets the smallest trained weights to 0, and a trained matrix holds zeros alone, as in "
                "a new LoRA. Train all weights, or prune the base first and use another method."
            )
        masks = [_largest(p.detach(), self.sparsity) for p in whole.parameters]
        with torch.no_grad():
            for parameter, mask in zip(whole.parameters, masks, strict=True):
                parameter.mul_(mask)
        return {str(i): mask for i, mask in enumerate(masks)}

    def gradient(self, step: Step) -> Gradient:
        gradient = weighted_sum(step, step.gradient("forget"), step.gradient("retain"))
        return [g * step.prepared[str(i)].to(g.dtype) for i, g in enumerate(gradient)]


def _largest(weight: Tensor, sparsity: float) -> Tensor:
    """True for all but the smallest share of a matrix, of equal ones the first; for a vector, everywhere."""
    kept = torch.ones_like(weight, dtype=torch.bool)
    if weight.dim() > 1:
        smallest = (
            weight.abs()
            .flatten()
            .argsort(stable=True, descending=True)[weight.numel() - int(sparsity * weight.numel()) :]
        )
        kept.view(-1)[smallest] = False
    return kept
