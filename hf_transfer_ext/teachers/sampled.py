"""A teacher that is asked for one number a token: the log-probability of the token that the student drew."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hf_transfer_ext.losses.fused import CHUNK_BYTES, CHUNK_BYTES_GPU
from hf_transfer_ext.losses.rows import DenseRows, SampledRows, SampledTokens
from hf_transfer_ext.teachers.signal import Teacher, TeacherSignal
from hf_transfer_ext.tensors import Mask

PerToken = Float[Tensor, " tokens"]


def sampled_signal(
    teacher: Teacher,
    student: nn.Module,
    inputs: dict[str, Any],
    mask: Mask,
    drawn: Int[Tensor, " tokens"],
    log_probs: PerToken,
    *,
    temperature: float = 1.0,
    trust_region: float | None = None,
    outliers: Literal["clip", "mask"] = "clip",
) -> TeacherSignal:
    """Rows that list the one token which was drawn at each place; see `drawn_rows`.

    Args:
        mask: `(batch, length - 1)`, True where a drawn token is predicted.
        drawn: The tokens.
        log_probs: Of the distribution that each was drawn from, in nats.
    """
    teacher_log_probs = token_log_probs(teacher, student, inputs, mask, drawn, temperature)
    return TeacherSignal(
        drawn_rows(drawn, log_probs, teacher_log_probs, temperature=temperature, trust_region=trust_region,
                   outliers=outliers)
    )  # fmt: skip


def drawn_rows(
    drawn: Int[Tensor, " tokens"],
    log_probs: PerToken,
    teacher_log_probs: PerToken,
    *,
    temperature: float = 1.0,
    trust_region: float | None = None,
    outliers: Literal["clip", "mask"] = "clip",
) -> SampledRows:
    r"""The teacher as the tokens that were drawn from the student: any divergence that is a sum of terms, unbiased.

    A token y that was drawn from :math:`\mu` stands for the whole sum, :math:`f(q_y, p_y) / \mu_y`. For reverse_kl and
    :math:`\mu = q` its value is :math:`\log q_y / p_y` and its gradient that of a policy gradient,
    :math:`-A \, \nabla \log q_y` with the advantage :math:`A = \log p_y - \log q_y`; where the student has changed
    since, both carry the importance weight :math:`q_y / \mu_y`.

    Args:
        drawn: The tokens.
        log_probs: :math:`\log \mu_y` in nats.
        teacher_log_probs: :math:`\log p_y` in nats, at `temperature`; -inf is allowed where a trust region clips.
        trust_region: Largest distance of log p from log mu that is believed, > 0; None believes every one. With it the
            estimate is biased where it is exceeded.
        outliers: What happens there: "clip" moves log p to the edge, "mask" leaves the token out.
    """
    gap = teacher_log_probs.float() - log_probs.float()
    factors = (-log_probs.float()).exp()
    if trust_region is not None:
        gap, factors = within_trust_region(gap, factors, trust_region, outliers)
    rows = SampledTokens(drawn[:, None], (log_probs.float() + gap)[:, None], factors[:, None])
    return SampledRows(rows, temperature=temperature)


def within_trust_region(
    gap: PerToken, factors: PerToken, size: float, outliers: Literal["clip", "mask"] = "clip"
) -> tuple[PerToken, PerToken]:
    r"""Tokens at which the teacher is further than this from the student lose their influence on the loss.

    .. math:: | \log p_y - \log \mu_y | \le \text{size}

    Set by `trust_region` and `outliers` of sampled_reverse_kl.

    Args:
        gap: :math:`\log p_y - \log \mu_y` of each token that was drawn, in nats.
        factors: What each token's term is multiplied by.
        size: In nats, > 0.
        outliers: "clip" moves log p to the edge, "mask" leaves the token out of the loss.

    When to use it: the student writes what its teacher has never seen, and single tokens with a probability of nearly
    0 drown all others; the gradient is biased where it acts, so choose a size that few tokens exceed.

    Returns:
        gap and factors, with the outliers changed.

    Source: TrOPD (its gradient clipping and masking), 2026, https://arxiv.org/abs/2606.01249
    """
    if outliers == "mask":
        return gap, torch.where(gap.abs() <= size, factors, 0.0)
    return gap.clamp(-size, size), factors


def token_log_probs(
    teacher: Teacher,
    student: nn.Module,
    inputs: dict[str, Any],
    mask: Mask,
    drawn: Int[Tensor, " tokens"],
    temperature: float = 1.0,
) -> PerToken:
    """The teacher's log-probability of each drawn token, in nats.

    Asks a teacher that has `token_log_probs` (a server) for these alone, and reads them from dense rows otherwise.

    Raises:
        ValueError: The teacher gives neither.
    """
    asked = getattr(teacher, "token_log_probs", None)
    if asked is not None:
        if temperature != 1:
            raise ValueError(
                f"`distill_temperature` is {temperature:g}, but a {type(teacher).__name__} gives the probability of "
                "single tokens, at temperature 1, which cannot be changed afterwards. Set `distill_temperature=1`."
            )
        return asked(inputs, mask).to(drawn.device)
    rows = teacher.signal(student, inputs, mask).rows
    if not isinstance(rows, DenseRows):
        raise ValueError(
            f"A {type(teacher).__name__} gives {rows.form} rows, which may lack the token that was drawn. Take a "
            "model, an adapter or a server as the teacher."
        )
    read = rows.reader()
    step = max(1, CHUNK_BYTES.get(drawn.device.type, CHUNK_BYTES_GPU) // (4 * rows.row_elements))
    found = drawn.new_zeros(len(drawn), dtype=torch.float32)
    with torch.no_grad():
        for start in range(0, len(drawn), step):
            part = slice(start, min(start + step, len(drawn)))
            logits = rows.finish(cast(Tensor, read(part)).float()) / temperature
            picked = drawn[part, None].to(logits.device)
            found[part] = (logits.gather(1, picked).squeeze(1) - logits.logsumexp(1)).to(found.device)
    return found
