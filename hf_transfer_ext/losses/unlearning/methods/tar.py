from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning_method import Gradient, Method, Step, weighted_sum


@dataclass(frozen=True)
class tar(Method):
    r"""Tamper-resistant forgetting: the forget loss is taken where an attacker gets by relearning.

    .. math:: \frac{1}{K + 1} \sum_{k=0}^{K} \nabla L_f(\theta_k) + \nabla L_r(\theta), \qquad
        \theta_0 = \theta, \quad
        \theta_k = \theta_{k-1} - \eta \operatorname{sign} \nabla \ell_{\theta_{k-1}}(y^f)

    An inner loop fine-tunes the model on the answers to forget; the gradients of the forget loss along its way are
    applied to the weights where it began (first order: no gradient flows through the inner steps). A step costs
    2 K passes more than `npo`, and a copy of the trained weights for each inner step.

    Deviations: the authors draw the attacker's data and settings at random, take Adam for it, and raise the entropy
    instead of the NPO loss; here the attacker relearns the same batch, by the sign of the gradient, which is Adam's
    first step.

    Args:
        inner_steps: Steps of the attacker (K), >= 0; 0 is `npo`.
        inner_rate: How far each step moves every trained weight (eta), >= 0: an attacker's learning rate under Adam.

    When to use it: where others can fine-tune the weights, and relearning has to be slow.

    Source: Tamirisa et al., "Tamper-resistant safeguards for open-weight LLMs", 2024, https://arxiv.org/abs/2408.00761
    """

    forget = "npo"
    retain = "retain_nll"

    inner_steps: int = 3
    inner_rate: float = 1e-4

    def __post_init__(self) -> None:
        require_at_least("inner_steps", self.inner_steps, 0)
        require_at_least("inner_rate", self.inner_rate, 0)

    def gradient(self, step: Step) -> Gradient:
        total = step.gradient("forget")
        with ExitStack() as relearned:
            for _ in range(self.inner_steps):
                relearned.enter_context(step.moved([-self.inner_rate * g.sign() for g in step.recall()]))
                total = [t + g for t, g in zip(total, step.gradient("forget"), strict=True)]
        forget = [t / (self.inner_steps + 1) for t in total]
        return weighted_sum(step, forget, step.gradient("retain"))
