from __future__ import annotations

from dataclasses import dataclass

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning_method import Gradient, Method, Step, weighted_sum


@dataclass(frozen=True)
class l1_sparse(Method):
    r"""Sparsity-aware unlearning: an l1 penalty on the trained weights beside the losses, which fades over the run.

    .. math:: \nabla L_f + \nabla L_r + \lambda (1 - t) \operatorname{sign}(\theta), \qquad t = \text{share of the run}

    Sparse models forget with less damage. The authors fine-tune on the retain set with the penalty and no forget
    loss: that is `gamma: 0`. Their other way is `prune_first`. Under PEFT the penalty is on the adapter's
    weights.

    Args:
        penalty: Weight of the penalty at the start (lambda), >= 0; 0 is `npo`.

    When to use it: with full fine-tuning on models that will be pruned, or where capacity to relearn has to go.

    Source: Jia et al., "Model sparsity can simplify machine unlearning", 2023, section 4 (decaying l1),
    https://arxiv.org/abs/2304.04934
    """

    forget = "npo"
    retain = "retain_nll"

    penalty: float = 5e-4

    def __post_init__(self) -> None:
        require_at_least("penalty", self.penalty, 0)

    def gradient(self, step: Step) -> Gradient:
        losses = weighted_sum(step, step.gradient("forget"), step.gradient("retain"))
        weight = self.penalty * (1.0 - step.progress.share)
        return [g + weight * p.detach().sign() for g, p in zip(losses, step.parameters, strict=True)]
