from __future__ import annotations

from dataclasses import dataclass

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning_method import Gradient, Method, Step, weighted_sum


@dataclass(frozen=True)
class qaf(Method):
    r"""Quantization-aware forgetting: NPO on the model as it is after rounding to few bits.

    .. math:: \nabla_\theta\, [L_f(\theta) + s\, L_f(Q(\theta))] / (1 + s) + \nabla_\theta L_r(\theta), \qquad
        \nabla_\theta Q(\theta) := I

    Forgetting moves weights so little that rounding takes them back to where they were. Here the forget loss also sees
    every linear layer but the head rounded to `2**bits - 1` even levels for each run of `block` weights (the
    rounding of the audit's attack `quantization`); the gradient passes straight through. A LoRA counts as merged
    before the rounding. The retain loss and the reference are not rounded.

    Args:
        bits: Of the rounded weights, from 2 to 8.
        block: Weights with a scale in common, >= 1.
        share: Weight s of the loss on the rounded model against that on the model as it is, >= 0; 0 is `npo`.

    When to use it: where the model will be quantized, or may be by whoever gets it.

    Source: this package's own, from two parts: the failure, in Zhang et al., "Catastrophic failure of LLM unlearning
    via quantization", 2025, https://arxiv.org/abs/2410.16454; the straight-through gradient, in Bengio et al.,
    "Estimating or propagating gradients through stochastic neurons", 2013, https://arxiv.org/abs/1308.3432
    """

    forget = "npo"
    retain = "retain_nll"

    bits: int = 4
    block: int = 64
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"`bits` must be from 2 to 8, got {self.bits}.")
        require_at_least("block", self.block, 1)
        require_at_least("share", self.share, 0)

    def gradient(self, step: Step) -> Gradient:
        plain, total = step.gradient("forget"), 1.0 + self.share
        with step.rounded(self.bits, self.block):
            rounded = step.gradient("forget")
        forget = [(p + self.share * r) / total for p, r in zip(plain, rounded, strict=True)]
        return weighted_sum(step, forget, step.gradient("retain"))
