from __future__ import annotations

import random
from collections import deque
from dataclasses import asdict
from typing import Any, ClassVar

from hf_transfer_ext.trainers.rollout_method import Rollout, RolloutMethod, Source


class distillm(RolloutMethod):
    r"""The student writes more as it stops improving on fixed data, and its texts are used again from a buffer.

    With the threshold :math:`\phi`, the progress t of training in [0, 1] and a uniform draw u for each batch:

    .. math:: u < \phi (1 - t): \text{the student writes}; \quad u < \phi: \text{replayed}; \quad
              \text{else the data}

    While the buffer is not full, the student writes for :math:`u < \phi`. It holds the `capacity` newest texts.
    :math:`\phi` starts at `on_policy_share`; an evaluation whose cross entropy is at least `tolerance` above the
    reference raises it by `step`, and becomes the reference. The first evaluation is the first reference. With several
    evaluation sets, their mean counts.

    Args:
        capacity: Texts in the buffer of each process, >= 1.
        step: What is added to :math:`\phi`, in (0, 1].
        tolerance: Nats per token by which the cross entropy has to rise, >= 0.

    When to use it: writing texts costs most of the time; with `loss="skew_reverse_kl"` or `skew_kl`, as published.

    Deviations: data batches are the teacher's where `teacher_writes` is set. Set `eval_on_start` to have the first
    reference before the first step, as the published code does.

    Source: DistiLLM, Ko et al. 2024, section 3.2 and its code (`finetune.py`), https://arxiv.org/abs/2402.03898
    """

    default_share: ClassVar[float] = 0.0
    reads_evaluations: ClassVar[bool] = True

    def __init__(self, *, capacity: int = 1000, step: float = 0.1, tolerance: float = 0.1) -> None:
        if capacity < 1 or not 0 < step <= 1 or not tolerance >= 0:
            raise ValueError(
                f"`capacity` has to be >= 1, `step` in (0, 1] and `tolerance` >= 0, got {capacity}, {step} and "
                f"{tolerance}."
            )
        self.step, self.tolerance = step, tolerance
        self.buffer: deque[Rollout] = deque(maxlen=capacity)
        self.raised = 0.0
        self.reference: float | None = None

    def check(self, args: Any) -> None:
        if args.eval_strategy == "no" and args.on_policy_share == 0:
            raise ValueError(
                "`eval_strategy` is no and `on_policy_share` 0, but distillm lets the student write once the held-out "
                "loss rises: it would never do. Set `eval_strategy`, or a share to start from."
            )

    def threshold(self, args: Any) -> float:
        """:math:`\\phi`, the share of batches with the student's texts, new or replayed."""
        return min(1.0, args.on_policy_share + self.raised)

    def sources(self, draw: float, args: Any, progress: float) -> tuple[Source, ...]:
        threshold = self.threshold(args)
        full = len(self.buffer) == self.buffer.maxlen
        if draw < threshold * (1 - progress) or (draw < threshold and not full):
            return ("student",)
        if draw < threshold:
            return ("replay",)
        return ("teacher",) if args.teacher_writes else ("data",)

    def note(self, written: list[Rollout]) -> None:
        self.buffer.extend(written)

    def replayed(self, count: int, seed: int) -> list[Rollout]:
        found = random.Random(seed).choices(list(self.buffer), k=count)
        return [Rollout(row.ids, row.labels, "replay", route=row.route) for row in found]

    def after_evaluation(self, cross_entropy: float) -> dict[str, float]:
        if self.reference is None:
            self.reference = cross_entropy
        elif cross_entropy >= self.reference + self.tolerance:
            self.raised, self.reference = min(1.0, self.raised + self.step), cross_entropy
        return {"on_policy_raised": self.raised}

    def state(self) -> dict[str, Any]:
        return {"raised": self.raised, "reference": self.reference, "buffer": [asdict(row) for row in self.buffer]}

    def restore(self, state: dict[str, Any]) -> None:
        self.raised, self.reference = state["raised"], state["reference"]
        self.buffer.clear()
        self.buffer.extend(Rollout(**row) for row in state["buffer"])
