from __future__ import annotations

from typing import Any, ClassVar

from hf_transfer_ext.trainers.rollout_method import RolloutMethod, Source


class gkd(RolloutMethod):
    r"""A share of the batches is written by the student, the rest comes from the data: the loss is the same on both.

    .. math:: L = (1 - \lambda) \, E_{(x, y) \sim data} D(p, q)
              + \lambda \, E_{x \sim data, \, y \sim q(\cdot | x)} D(p, q)

    with :math:`\lambda` = `on_policy_share` and D = `loss`. No gradient flows through sampling. With `teacher_writes`
    the other batches are written by the teacher instead of the data set (sequence-level distillation).

    When to use it: the student is to learn from its own mistakes, and the teacher's whole distribution is at hand.

    Deviations: the paper has no cross entropy; here `ce_weight` adds it on texts that the student did not write.

    Source: GKD, Agarwal et al. 2024, algorithm 1, https://arxiv.org/abs/2306.13649
    """

    default_share: ClassVar[float] = 0.5

    def sources(self, draw: float, args: Any, progress: float) -> tuple[Source, ...]:
        if draw < args.on_policy_share:
            return ("student",)
        return ("teacher",) if args.teacher_writes else ("data",)
