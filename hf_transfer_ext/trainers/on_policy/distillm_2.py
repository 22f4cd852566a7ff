from __future__ import annotations

from typing import Any, ClassVar

import torch

from hf_transfer_ext.losses.distillation import skew_kl, skew_reverse_kl
from hf_transfer_ext.losses.slopes import SLOPES, Outcomes, PerRow, Rows, fused_by
from hf_transfer_ext.tensors import Logits, PerToken
from hf_transfer_ext.trainers.rollout_method import RolloutMethod, RolloutTokens, Source


class distillm_2(RolloutMethod):
    r"""Each prompt is answered twice: the teacher's answer is made likelier, the student's own less likely.

    .. math:: L = (2 - \beta) \, SKL_{\alpha}(p, q) \text{ on the teacher's answers}
              + \beta \, SRKL_{\alpha}(p, q) \text{ on the student's}

    SKL and SRKL are those of `skew_kl` and `skew_reverse_kl`; the loss is the mean over the tokens of both answers.
    The answers of the data count as the teacher's; with `teacher_writes` it writes them during training.

    Args:
        beta: :math:`\beta`, weight of the student's answers, in [0, 2].

    When to use it: the data hold the teacher's answers (or it can write), and the student's mistakes are to be
    unlearned as well.

    Deviations: the skew is constant (`loss_options={"skew": ...}` of the config, .1 by default), where the paper
    adapts it to each sample; and one mean is taken over all tokens of a step, not one for each kind of answer.

    Source: DistiLLM-2, Ko et al. 2025, equations 4 and 5, https://arxiv.org/abs/2503.07067
    """

    default_share: ClassVar[float] = 1.0
    default_loss: ClassVar[str] = "skew_kl"

    def __init__(self, *, beta: float = 1.0) -> None:
        if not 0 <= beta <= 2:
            raise ValueError(f"`beta` has to lie in [0, 2], got {beta}.")
        self.beta = beta

    def check(self, args: Any) -> None:
        if args.loss != "skew_kl":
            raise ValueError(
                f"`loss` is {args.loss!r}, but distillm_2 takes skew_kl on the teacher's answers and skew_reverse_kl "
                'on the student\'s. Set `loss="skew_kl"`.'
            )
        if args.on_policy_share < 1:
            raise ValueError(
                f"`on_policy_share` is {args.on_policy_share:g}, but distillm_2 needs both answers to each prompt. "
                "Set 1."
            )

    def needs_completions(self, args: Any) -> bool:
        return not args.teacher_writes

    def student_writes_all(self, args: Any) -> bool:
        return False

    def sources(self, draw: float, args: Any, progress: float) -> tuple[Source, ...]:
        return ("teacher" if args.teacher_writes else "data", "student")

    def evaluated_on(self, args: Any, has_completions: bool) -> tuple[Source, ...]:
        return self.sources(0.0, args, 0.0)

    def terms(self, tokens: RolloutTokens, args: Any) -> dict[str, Any]:
        by_student = tokens.by_student
        return {
            **super().terms(tokens, args),
            "divergence": contrastive,
            "by_student": by_student,
            "kd_factors": torch.where(by_student, self.beta, 2.0 - self.beta),
        }


def _slope(student: Outcomes, teacher: Outcomes, *, skew: float = 0.1, by_student: Any = False) -> tuple[PerRow, Rows]:
    (value, slope), (reverse, reverse_slope) = (
        SLOPES[one](student, teacher, skew=skew) for one in (skew_kl, skew_reverse_kl)
    )
    chosen = torch.as_tensor(by_student, device=student.log.device)
    return torch.where(chosen.reshape(-1), reverse, value), torch.where(chosen, reverse_slope, slope)


@fused_by(_slope, forms=("dense", "sparse"))
def contrastive(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    skew: float = 0.1,
    by_student: Any = False,
    temperature: float = 1.0,
) -> PerToken:
    """`skew_reverse_kl` of the tokens that the student wrote, and `skew_kl` of all others.

    Args:
        by_student: Whether it wrote them; a boolean, or one for each token.
    """
    given = {"skew": skew, "temperature": temperature}
    forward, reverse = (one(student_logits, teacher_logits, **given) for one in (skew_kl, skew_reverse_kl))
    return torch.where(torch.as_tensor(by_student, device=forward.device), reverse, forward)
