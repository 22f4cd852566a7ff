from __future__ import annotations

from typing import Any, ClassVar

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.slopes import require_form
from hf_transfer_ext.trainers.rollout_method import RolloutMethod, Source


class sampled_reverse_kl(RolloutMethod):
    r"""Reverse KL from the tokens that the student drew: the teacher tells one number for each of them.

    .. math:: \nabla L = - E_{y \sim \mu} \Big[ \frac{q_y}{\mu_y} A_y \nabla \log q_y \Big],
              \quad A_y = \log p_y - \log q_y

    at each token, a policy gradient with the discount 0: :math:`\mu` is the student when it drew the token, q as it is
    now, p the teacher. The expected gradient is that of reverse_kl over the whole vocabulary at the same texts,
    without bias; it varies more. `kd` in the logs is the mean of :math:`-A`, an estimate that can be negative.

    `loss` left out is reverse_kl. Where it names another divergence that is a sum of terms over the vocabulary, that
    one is estimated in the same way, by :math:`f(q_y, p_y) / \mu_y`.

    Args:
        trust_region: Largest distance between log p and :math:`\log \mu` that is believed, in nats, > 0; None believes
            every one. A teacher that has never seen a text like the student's gives single tokens a probability of
            nearly 0, and their advantage drowns all others. The gradient is biased where it is exceeded.
        outliers: What happens there: "clip" moves log p to the edge, "mask" leaves the token out of the loss.

    When to use it: the teacher is behind a server (`ServerTeacher`) that gives the log-probability of tokens it is
    sent; or texts are long, and the exact divergence is too slow. One drawn token in place of a distribution makes
    the gradient noisy: take more texts for each step, or a fifth of the learning rate of `gkd`.

    Source: On-Policy Distillation, Lu and Thinking Machines Lab 2025,
    https://thinkingmachines.ai/blog/on-policy-distillation/; the trust region follows TrOPD (its gradient clipping and
    masking, not its forward-KL estimate of outliers nor its teacher prefixes), 2026, https://arxiv.org/abs/2606.01249
    """

    default_share: ClassVar[float] = 1.0
    default_loss: ClassVar[str] = "reverse_kl"
    sampled_tokens: ClassVar[bool] = True
    notes_log_probs: ClassVar[bool] = True

    def __init__(self, *, trust_region: float | None = None, outliers: str = "clip") -> None:
        if trust_region is not None and not trust_region > 0:
            raise ValueError(f"`trust_region` has to be > 0, or None, got {trust_region}.")
        if outliers not in ("clip", "mask"):
            raise ValueError(f"`outliers` has to be clip or mask, got {outliers!r}.")
        self.trust_region, self.outliers = trust_region, outliers

    def check(self, args: Any) -> None:
        require_form(DISTILLATION_LOSSES[args.loss], "sampled")
        if args.on_policy_share < 1 or args.teacher_writes:
            raise ValueError(
                f"`on_policy_share` is {args.on_policy_share:g} and `teacher_writes` {args.teacher_writes}, but "
                "sampled_reverse_kl learns from tokens that the student drew. Set 1 and False, or choose gkd."
            )

    def sources(self, draw: float, args: Any, progress: float) -> tuple[Source, ...]:
        return ("student",)

    def evaluated_on(self, args: Any, has_completions: bool) -> tuple[Source, ...]:
        return ("student",)

    def trust(self) -> dict[str, Any]:
        return {"trust_region": self.trust_region, "outliers": self.outliers}
