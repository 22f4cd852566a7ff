"""One core for every token divergence: hidden states and heads in, loss and gradients out, full logits never built.

The head is applied to a chunk of tokens at a time, and the gradient is computed right there, in the forward pass, so
that a chunk's logits are the only ones that ever exist. Inside a chunk the divergence works on a few rows at a time,
which stay in the processor's cache; its temporaries cost nothing worth counting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.slopes import SLOPES, logit_gradient
from hf_transfer_ext.models.heads import LMHead

#: Bytes of one chunk's logits, for each of the two models: 192 tokens of a 152k vocabulary in float32 on a CPU.
CHUNK_BYTES = {"cpu": 117_000_000}
CHUNK_BYTES_GPU = 512_000_000
#: Rows of the head that one product takes. A CPU repacks them for each product: so few stay in its cache meanwhile,
#: which makes a projection, and the head's gradient in bfloat16, a fifth faster.
HEAD_ROWS = {"cpu": 1_024}
HEAD_ROWS_GPU = 32_768
#: Elements that the divergence works on at once: about what a CPU's cache holds, and plenty for a GPU.
BLOCK_ELEMENTS = {"cpu": 600_000}
BLOCK_ELEMENTS_GPU = 40_000_000


class FusedLoss(NamedTuple):
    """The loss and its parts.

    loss: Sum over tokens of weight * (kd_weight * divergence + ce_weight * cross entropy); carries the gradient.
    divergence: For each token, without weight and gradient.
    cross_entropy: For each token, without weight and gradient; zeros where no labels were given.
    """

    loss: Float[Tensor, ""]
    divergence: Float[Tensor, " tokens"]
    cross_entropy: Float[Tensor, " tokens"]


def fused_linear_divergence(
    student_hidden: Float[Tensor, "tokens hidden"],
    student_head: LMHead,
    teacher_hidden: Float[Tensor, "tokens teacher_hidden"],
    teacher_head: LMHead,
    divergence: Callable[..., Tensor],
    *,
    weights: Float[Tensor, " tokens"],
    labels: Int[Tensor, " tokens"] | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    **options: Any,
) -> FusedLoss:
    """Weighted sum of a token divergence, and of cross entropy, between two models given by hidden states and heads.

    Gradients flow to the student's hidden states, head weight and head bias, as far as these require them; a frozen
    head costs nothing. Logits have the dtype of the head (of autocast, where it is on); divergences, cross entropy and
    the head's gradient are summed in float32.

    Args:
        student_hidden: Hidden states of the tokens that count, and only these: `hidden[mask]`. No token is fine.
        teacher_hidden: The teacher's hidden states of the same tokens; its width may differ.
        divergence: A function of `losses.distillation`, or any with its signature; one without a registered slope is
            differentiated by autograd, a few rows at a time.
        weights: What each token counts: 1 / tokens of the step for a mean.
        labels: The tokens to predict; needed for `ce_weight > 0`. Cross entropy takes the student's full vocabulary
            and no temperature.
        kd_weight: Factor of the divergence, >= 0. Hinton's convention of temperature**2 goes in here.
        ce_weight: Factor of the cross entropy, >= 0.
        temperature: > 0, divides both models' logits in the divergence.
        chunk_tokens: Tokens whose logits exist at once; by default so many that they fill `CHUNK_BYTES`.
        options: Passed to the divergence (`beta`, `skew`, ...).

    The divergence is taken over the vocabulary that both heads share, the first min(V_student, V_teacher) entries:
    padding rows of the larger head take no part. Whether the entries mean the same tokens is the caller's check.
    """
    _check(student_hidden, teacher_hidden, labels, ce_weight, temperature)
    plan = _Plan(divergence, student_head, teacher_head.detach(), kd_weight, ce_weight, temperature, options)
    row_bytes = max(student_head.vocab_size, teacher_head.vocab_size) * student_head.weight.element_size()
    chunk = chunk_tokens or max(1, CHUNK_BYTES.get(student_hidden.device.type, CHUNK_BYTES_GPU) // row_bytes)
    loss, kd, ce = _FusedLinearDivergence.apply(
        student_hidden,
        student_head.weight,
        student_head.bias,
        teacher_hidden.detach(),
        labels,
        weights.detach().float(),
        plan,
        chunk,
    )
    return FusedLoss(loss, kd, ce)


def divergence_of_logits(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens teacher_vocab"],
    divergence: Callable[..., Tensor],
    *,
    weights: Float[Tensor, " tokens"],
    labels: Int[Tensor, " tokens"] | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    **options: Any,
) -> FusedLoss:
    """The same loss where logits exist already, because a head is adapted or quantised: a few rows at a time.

    Arguments and result are those of `fused_linear_divergence`. Beside the logits one more tensor of their size lives,
    their gradient.
    """
    _check(student_logits, teacher_logits, labels, ce_weight, temperature)
    plan = _Plan(divergence, _NO_HEAD, _NO_HEAD, kd_weight, ce_weight, temperature, options)
    loss, kd, ce = _DivergenceOfLogits.apply(
        student_logits, teacher_logits.detach(), labels, weights.detach().float(), plan
    )
    return FusedLoss(loss, kd, ce)


class _Finish(NamedTuple):
    """What is left of a head once its projection is done."""

    scale: float = 1.0
    softcap: float | None = None

    def finish(self, projected: Tensor) -> Tensor:
        return projected


_NO_HEAD = _Finish()


class _Plan(NamedTuple):
    divergence: Callable[..., Tensor]
    student_head: LMHead | _Finish
    teacher_head: LMHead | _Finish
    kd_weight: float
    ce_weight: float
    temperature: float
    options: dict[str, Any]


def _check(student: Tensor, teacher: Tensor, labels: Tensor | None, ce_weight: float, temperature: float) -> None:
    if ce_weight and labels is None:
        raise ValueError(f"`ce_weight` is {ce_weight}, which needs `labels`. Give them, or set `ce_weight=0`.")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"Student and teacher have to see the same tokens, got {student.shape[0]} and {teacher.shape[0]} of them. "
            "Select the tokens of both with one mask."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` has to be > 0, got {temperature}.")


class _FusedLinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, labels, weights, plan, chunk):
        device = hidden.device
        dtype, teacher_dtype = _projection_dtype(weight), _projection_dtype(plan.teacher_head.weight)
        tokens = hidden.shape[0]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        kd = torch.zeros(tokens, device=device)
        ce = torch.zeros(tokens, device=device)
        with torch.autocast(device.type, enabled=False):
            student = _Projection(hidden.to(dtype), plan.student_head, dtype, min(chunk, tokens))
            teacher = student  # without a divergence the teacher is not read
            if plan.kd_weight:
                teacher = _Projection(
                    teacher_hidden.to(teacher_dtype), plan.teacher_head, teacher_dtype, min(chunk, tokens)
                )
            d_hidden = torch.empty_like(hidden) if need_hidden else None
            d_weight = torch.zeros_like(weight) if need_weight else None
            rest = torch.zeros_like(weight) if need_weight and weight.dtype.itemsize < 4 else None
            d_bias = torch.zeros(bias.shape, device=device) if need_bias else None
            for start in range(0, tokens, chunk):
                part = slice(start, min(start + chunk, tokens))
                logits = student(part)
                teacher_logits = logits if teacher is student else teacher(part)
                _rows_in_place(
                    logits, teacher_logits, None if labels is None else labels[part], weights[part], kd[part],
                    ce[part], plan, any((need_hidden, need_weight, need_bias)),
                )  # fmt: skip
                if d_hidden is not None:
                    d_hidden[part] = (logits @ student.weight).to(hidden.dtype)
                if d_weight is not None:
                    _add_outer(d_weight, rest, logits, student.hidden[part])
                if d_bias is not None:
                    d_bias += logits.float().sum(0)
        ctx.grads = (
            d_hidden,
            d_weight,
            None if d_bias is None else d_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(kd, ce)
        return _weighted_sum(kd, ce, weights, plan), kd, ce

    @staticmethod
    def backward(ctx, d_loss, *_):
        return (*_handed_out_once(ctx, d_loss), None, None, None, None, None)


class _DivergenceOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, teacher_logits, labels, weights, plan):
        kd = torch.zeros(logits.shape[0], device=logits.device)
        ce = torch.zeros_like(kd)
        gradient = logits.clone()
        with torch.autocast(logits.device.type, enabled=False):
            _rows_in_place(gradient, teacher_logits, labels, weights, kd, ce, plan, ctx.needs_input_grad[0])
        ctx.grads = (gradient,)
        ctx.mark_non_differentiable(kd, ce)
        return _weighted_sum(kd, ce, weights, plan), kd, ce

    @staticmethod
    def backward(ctx, d_loss, *_):
        return (*_handed_out_once(ctx, d_loss), None, None, None, None)


def _weighted_sum(kd: Tensor, ce: Tensor, weights: Tensor, plan: _Plan) -> Tensor:
    """The loss. A sum over no token is 0, and the infinite loss of a token without weight stays out."""
    return torch.where(weights != 0, weights * (plan.kd_weight * kd + plan.ce_weight * ce), 0.0).sum()


def _handed_out_once(ctx, d_loss: Tensor) -> list[Tensor | None]:
    """The gradients of the forward pass times the loss's own; they are scaled in place, so there is no second time."""
    if ctx.grads is None:
        raise RuntimeError("The fused loss hands out its gradients once; a second backward needs a second forward.")
    grads, ctx.grads = ctx.grads, None
    return [None if grad is None else grad.mul_(d_loss) for grad in grads]


class _Projection:
    """Hidden states through a head, one chunk at a time, into one buffer that every chunk overwrites."""

    def __init__(self, hidden: Tensor, head: LMHead, dtype: torch.dtype, rows: int) -> None:
        self.hidden, self.head = hidden, head
        self.weight = head.weight.detach().to(dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(dtype)
        self.buffer = hidden.new_empty(rows, head.vocab_size, dtype=dtype)

    def __call__(self, part: slice) -> Tensor:
        """Projected logits, `(rows, vocab)`, before scale and soft cap. The next call overwrites them."""
        hidden = self.hidden[part]
        projected = self.buffer[: hidden.shape[0]]
        for rows in _head_rows(self.weight):
            torch.mm(hidden, self.weight[rows].T, out=projected[:, rows])
        return projected if self.bias is None else projected.add_(self.bias)


def _projection_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the model itself would project: autocast's for float32 weights, else the weight's own."""
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype == torch.float32:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _add_outer(total: Tensor, rest: Tensor | None, d_logits: Tensor, hidden: Tensor) -> None:
    """total += d_logits.T @ hidden.

    A `total` in a short dtype is summed as `total + rest`, where `rest` holds what rounding takes from `total`: as
    good as float32 for a sum of such products, in no more memory, and the result needs no copy in its own dtype.
    """
    if total.dtype == d_logits.dtype and rest is None:
        total.addmm_(d_logits.T, hidden)
        return
    for rows in _head_rows(total):
        product = d_logits[:, rows].T.contiguous() @ hidden
        if rest is None:
            total[rows] += product
        else:
            exact = product.float() + rest[rows].float() + total[rows].float()
            total[rows] = exact
            rest[rows] = exact - total[rows].float()


def _head_rows(head: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of a head."""
    rows = HEAD_ROWS.get(head.device.type, HEAD_ROWS_GPU)
    return (slice(start, start + rows) for start in range(0, head.shape[0], rows))


def _rows_in_place(logits, teacher_logits, labels, weights, kd, ce, plan: _Plan, need_gradient: bool) -> None:
    """Turn a chunk's projected logits into their weighted gradient, in place; note each row's divergence and CE."""
    limit = BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS_GPU)
    rows = max(1, limit // logits.shape[1])
    if logits.device.type == "cpu":
        threads = torch.get_num_threads()
        rows = max(threads, rows // threads * threads)  # a row is one thread's work
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        gradient, kd[part], ce[part] = _block(
            logits[part], teacher_logits[part], None if labels is None else labels[part], weights[part], plan
        )
        if need_gradient:
            logits[part] = gradient


def _block(projected, teacher_projected, labels, weights, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted gradient of a few rows with respect to the projected logits, their divergence and their CE."""
    head, temperature = plan.student_head, plan.temperature
    z = head.finish(projected.float())
    vocab = z.shape[1]
    shared = min(vocab, teacher_projected.shape[1])
    slope_of = SLOPES.get(plan.divergence)
    log_q = None
    zeros = z.new_zeros(z.shape[0])
    gradient: Tensor | None = None
    kd = ce = zeros

    if plan.kd_weight:
        t = plan.teacher_head.finish(teacher_projected[:, :shared].float())
        if slope_of is None:
            kd, d_kd = _by_autograd(plan, z[:, :shared], t)
        else:
            log_q = (z[:, :shared] if temperature == 1 else z[:, :shared] / temperature).log_softmax(-1)
            log_p = (t if temperature == 1 else t / temperature).log_softmax(-1)
            kd, slope = slope_of(log_q, log_p, **plan.options)
            d_kd = logit_gradient(log_q, slope, temperature)
        d_kd = d_kd.mul_(plan.kd_weight)
        gradient = d_kd if shared == vocab else torch.nn.functional.pad(d_kd, (0, vocab - shared))
    if labels is not None:
        same = log_q is not None and temperature == 1 and shared == vocab
        log_probs = log_q if same else z.log_softmax(-1)
        assert log_probs is not None
        ce = -log_probs.gather(1, labels[:, None]).squeeze(1)
        if plan.ce_weight:
            d_ce = log_probs.exp()
            d_ce[torch.arange(len(labels), device=labels.device), labels] -= 1.0
            gradient = d_ce.mul_(plan.ce_weight) if gradient is None else gradient.add_(d_ce, alpha=plan.ce_weight)
    if gradient is None:
        gradient = torch.zeros_like(z)
    if head.softcap is not None:
        gradient.mul_(1.0 - (z / head.softcap).square())
    factor = weights if head.scale == 1.0 else weights * head.scale
    # A token without weight has no gradient, even where its loss is infinite.
    gradient = torch.where(weights[:, None] != 0, gradient.mul_(factor[:, None]), 0.0)
    return gradient, kd, ce


def _by_autograd(plan: _Plan, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of a formula that states no slope, on a few rows."""
    with torch.enable_grad():
        leaf = z.detach()[None].requires_grad_()
        per_token = plan.divergence(leaf, t[None], temperature=plan.temperature, **plan.options)
        (gradient,) = torch.autograd.grad(per_token.sum(), leaf)
    return per_token.detach()[0], gradient[0]
