from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hf_transfer_ext.trainers.rollout_method import RolloutMethod, RolloutTokens, Source

PerToken = Float[Tensor, " tokens"]


class minillm(RolloutMethod):
    r"""Policy gradient on the reverse KL of whole texts, which student and teacher write together.

    With :math:`\tilde p = \alpha p + (1 - \alpha) q`, from which each token is drawn, the rewards
    :math:`r_k = \log p_k - \log q_k` at the time of drawing, and :math:`w_t = q_t / \tilde p_t` at the drawn token,

    .. math:: \nabla L = E_{y \sim \tilde p} \sum_t w_t \Big[ \nabla KL(q_t \| p_t) - R_t \nabla \log q_t \Big],
              \quad R_t = \frac{\sum_{k > t} \gamma^{k-t-1} r_k}{\sum_{k > t} \gamma^{k-t-1}}

    The first term is exact over the vocabulary (the paper's single-step part), the second is what a token does to all
    later ones, as a mean over them, so that long texts are not avoided. With `ce_weight` each batch has the data's
    completions as well, on cross entropy alone (the paper's language-modeling loss).

    Args:
        teacher_mix: :math:`\alpha`, the teacher's share of the mixture, in (0, 1).
        discount: :math:`\gamma`, in [0, 1]. At 1 the mean is the paper's length normalization.

    When to use it: mistakes early in a text spoil the rest of it, which a loss for each token alone does not see.

    Deviations: each text serves for one step, so that PPO's ratio is 1 and its clipping never acts. :math:`w_t` is of
    one token, as in the paper; the rewards are not rescaled by their deviation.

    Source: MiniLLM, Gu et al. 2024, equations 4 to 9 and its code (discount), https://arxiv.org/abs/2306.08543
    """

    default_share: ClassVar[float] = 1.0
    default_loss: ClassVar[str] = "reverse_kl"
    notes_log_probs: ClassVar[bool] = True

    def __init__(self, *, teacher_mix: float = 0.2, discount: float = 0.95) -> None:
        if not 0 < teacher_mix < 1 or not 0 <= discount <= 1:
            raise ValueError(
                f"`teacher_mix` has to lie in (0, 1) and `discount` in [0, 1], got {teacher_mix} and {discount}."
            )
        self.teacher_mix, self.discount = teacher_mix, discount

    def check(self, args: Any) -> None:
        needed = {
            "loss": "reverse_kl", "sampling_temperature": 1.0, "distill_temperature": 1.0, "on_policy_share": 1.0,
            "teacher_writes": False,
        }  # fmt: skip
        for name, value in needed.items():
            if getattr(args, name) != value:
                raise ValueError(f"`{name}` is {getattr(args, name)!r}, but minillm needs {value!r}.")

    def needs_completions(self, args: Any) -> bool:
        return args.ce_weight > 0

    def student_writes_all(self, args: Any) -> bool:
        return False

    def sources(self, draw: float, args: Any, progress: float) -> tuple[Source, ...]:
        return ("mixture", "data") if args.ce_weight else ("mixture",)

    def evaluated_on(self, args: Any, has_completions: bool) -> tuple[Source, ...]:
        return self.sources(0.0, args, 0.0)

    def terms(self, tokens: RolloutTokens, args: Any) -> dict[str, Any]:
        log_q, log_p = tokens.log_probs, tokens.teacher_log_probs
        weights = importance(log_q, log_p, self.teacher_mix)
        returns = mean_returns(log_p - log_q, tokens.row, self.discount)
        return {
            **self.objective(tokens, args),
            "ce_weight": 1.0,  # of -log q: the policy gradient's, and that of the data
            "ce_factors": torch.where(tokens.by_student, args.kd_weight * weights * returns, args.ce_weight),
        }

    def objective(self, tokens: RolloutTokens, args: Any) -> dict[str, Any]:
        weights = importance(tokens.log_probs, tokens.teacher_log_probs, self.teacher_mix)
        return {**super().terms(tokens, args), "kd_factors": torch.where(tokens.by_student, weights, 0.0)}


def importance(log_q: PerToken, log_p: PerToken, share: float) -> PerToken:
    """q / (share * p + (1 - share) * q) of each token, at most 1 / (1 - share)."""
    return 1.0 / (share * (log_p - log_q).exp() + (1.0 - share))


def mean_returns(rewards: PerToken, row: Tensor, discount: float) -> PerToken:
    """Discounted mean of the rewards of all later tokens of the same text; 0 for its last token.

    Args:
        row: The text of each token.
    """
    found = torch.zeros_like(rewards)
    total = weight = 0.0
    values, texts = rewards.tolist(), row.tolist()
    for t in range(len(values) - 2, -1, -1):
        if texts[t + 1] != texts[t]:
            total = weight = 0.0
            continue
        total, weight = values[t + 1] + discount * total, 1.0 + discount * weight
        found[t] = total / weight
    return found
