from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_transfer_ext.losses.needs import require_at_least
from hf_transfer_ext.losses.unlearning_method import Method, Part, Progress


@dataclass(frozen=True)
class pdu(Method):
    r"""Primal-dual unlearning: forget as much as a bound on the retain loss allows.

    .. math:: \min_\theta \max_{\lambda \ge 0} \; L_f(\theta) + \lambda (L_r(\theta) - \epsilon), \qquad
        \lambda \leftarrow \max(0, \lambda + \eta (L_r - \epsilon))

    The forget loss flattens the logits (`flat_logits`), the retain loss is the cross-entropy. The dual variable is the
    weight of the retain loss: it grows while the retain loss is above its bound and falls while it is below. It starts
    to move after the warm-up, is updated once per optimizer step with the retain loss of the whole step, and is saved
    in checkpoints. With such a large first weight, use a small learning rate or clip gradients.

    Args:
        dual: Weight of the retain loss at the start (lambda), >= 0.
        dual_rate: Step size of the dual variable (eta), >= 0; 0 keeps it where it is.
        bound: Retain loss that is allowed (epsilon), in nats per token, >= 0.
        warmup_epochs: Passes over the forget set before the dual variable moves, >= 0.

    When to use it: where utility has a hard limit that you can name as a loss.

    Source: Entesari et al., "Constrained entropic unlearning: a primal-dual framework for large language models",
    2025, https://arxiv.org/abs/2506.05314
    """

    forget = "flat_logits"
    retain = "retain_nll"
    sets = ("alpha",)
    requires_retain = True

    dual: float = 100.0
    dual_rate: float = 5.0
    bound: float = 0.3
    warmup_epochs: float = 5.0

    def __post_init__(self) -> None:
        for name in ("dual", "dual_rate", "bound", "warmup_epochs"):
            require_at_least(name, getattr(self, name), 0)

    def start(self) -> dict[str, float]:
        return {"dual": self.dual}

    def weights(
        self, gamma: float, alpha: float, progress: Progress, learned: Mapping[str, float]
    ) -> tuple[float, float]:
        return gamma, learned["dual"]

    def learn(
        self, learned: Mapping[str, float], losses: Mapping[Part, float], progress: Progress
    ) -> dict[str, float]:
        if progress.epoch < self.warmup_epochs:
            return dict(learned)
        return {"dual": max(0.0, learned["dual"] + self.dual_rate * (losses["retain"] - self.bound))}
