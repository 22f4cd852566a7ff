"""One core for every token divergence: hidden states and heads in, loss and gradients out, full logits never built.

The head is applied to a chunk of tokens at a time, and the gradient is computed right there, in the forward pass, so
that a chunk's logits are the only ones that ever exist. Inside a chunk the divergence works on a few rows at a time,
which stay in the processor's cache; its temporaries cost nothing worth counting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hf_transfer_ext.losses.rows import (
    Block,
    CombinedBlock,
    CombinedRows,
    HeadRows,
    LogitRows,
    Projection,
    SampledRows,
    SampledTokens,
    SparseRows,
    TeacherRows,
    TopTokens,
    head_row_slices,
    projection_dtype,
    wide_dtype,
    wide_product,
)
from hf_transfer_ext.losses.slopes import SLOPES, Outcomes, logit_gradient, require_form, weighted_sum
from hf_transfer_ext.models.heads import LMHead, LogitFinish
from hf_transfer_ext.tensors import keep_freed_memory

#: Bytes of one chunk's logits, for each of the two models: 192 tokens of a 152k vocabulary in float32 on a CPU.
CHUNK_BYTES = {"cpu": 117_000_000}
CHUNK_BYTES_GPU = 512_000_000
#: Elements that the divergence works on at once: about what a CPU's cache holds, and plenty for a GPU.
BLOCK_ELEMENTS = {"cpu": 600_000}
BLOCK_ELEMENTS_GPU = 40_000_000
#: Gradients in float16 are stored multiplied by this, so that small ones do not vanish. Between a softmax and one of
#: its logits a divergence's derivative is about 1 at most, which leaves a factor of 256 to the largest float16.
FLOAT16_GAIN = 256.0

ZRows = Float[Tensor, "rows vocab"]
PerRow = Float[Tensor, " rows"]


class TokenStatistics(NamedTuple):
    """The student's own distribution at each token, at temperature 1.

    entropy: In nats.
    correct: 1 where the label is the likeliest token, else 0.
    """

    entropy: Float[Tensor, " tokens"]
    correct: Float[Tensor, " tokens"]


class FusedLoss(NamedTuple):
    """The loss and its parts.

    loss: Sum over tokens of weight * (kd_weight * divergence + ce_weight * cross entropy); carries the gradient.
    divergence: For each token, without weight and gradient.
    cross_entropy: For each token, without weight and gradient; zeros where no labels were given.
    statistics: What else was asked for about each token.
    """

    loss: Float[Tensor, ""]
    divergence: Float[Tensor, " tokens"]
    cross_entropy: Float[Tensor, " tokens"]
    statistics: TokenStatistics | None = None


def fused_divergence(
    student_hidden: Float[Tensor, "tokens hidden"],
    student_head: LMHead,
    teacher: TeacherRows | None,
    divergence: Callable[..., Tensor],
    *,
    weights: Float[Tensor, " tokens"],
    labels: Int[Tensor, " tokens"] | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    kd_factors: Float[Tensor, " tokens"] | None = None,
    ce_factors: Float[Tensor, " tokens"] | None = None,
    statistics: bool = False,
    float32_logits: bool = True,
    **options: Any,
) -> FusedLoss:
    """Weighted sum of a token divergence, and of cross entropy, between a teacher and a student with a plain head.

    Gradients flow to the student's hidden states, head weight and head bias, as far as these require them; a frozen
    head costs nothing, and under `torch.no_grad()` no gradient is computed. Head and hidden states are multiplied in
    the dtype of the head (of autocast, where it is on); divergences, cross entropy, the head's gradient and, unless
    `float32_logits` is off, logits are summed in float32.

    Gradients are computed in the forward pass and consumed by the first backward pass. They are constants: a second
    derivative (`create_graph=True`) is refused.

    Args:
        student_hidden: Hidden states of the tokens that count, and only these: `hidden[mask]`. No token is fine.
        teacher: The teacher's rows for the same tokens: `HeadRows`, `LogitRows`, `SparseRows`, `SampledRows`, your
            own, or `CombinedRows` of several teachers. None where `kd_weight` is 0.
        divergence: A function of `losses.distillation`, or any with its signature; one without a registered slope is
            differentiated by autograd, a few rows at a time.
        weights: Weight of each token's loss: 1 / tokens of the step for a mean.
        labels: The tokens to predict; needed for `ce_weight > 0`. Cross entropy takes the student's full vocabulary
            and no temperature.
        kd_weight: Factor of the divergence, >= 0. Hinton's convention of temperature**2 goes in here.
        ce_weight: Factor of the cross entropy, >= 0.
        temperature: > 0, divides both models' logits in the divergence.
        chunk_tokens: Tokens whose logits exist at once; by default as many as fit in `CHUNK_BYTES`.
        kd_factors: Further factor of each token's divergence, of any sign; 1 without it.
        ce_factors: Further factor of each token's cross entropy, of any sign; 1 without it.
        statistics: Compute `TokenStatistics` as well; needs `labels`.
        float32_logits: Compute the logits of a head of half precision in float32. Off, they are rounded to its dtype,
            as the model itself rounds them: less time and memory, and a gradient that is mostly rounding where the
            student is close to the teacher. A teacher that is a mixture is read in float32 in any case.
        options: Passed to the divergence (`beta`, `skew`, ...). A tensor has one value for each token; its divergence
            gets them as a column, `(rows, 1)`.

    With dense rows the divergence is taken over the vocabulary that both models share, the first
    min(V_student, V_teacher) entries: padding rows of the larger head take no part. With sparse rows it is taken over
    the listed tokens and one bucket for all others; with sampled rows it is estimated. Whether the entries mean the
    same tokens is the caller's check.

    Raises:
        ValueError: The divergence does not accept the form of the rows, or an argument is missing or out of range.
    """
    objective = _Objective(divergence, kd_weight, ce_weight, temperature, options)
    _check(len(student_hidden), student_head.vocab_size, teacher, labels, statistics, objective)
    if isinstance(teacher, HeadRows) and not float32_logits:
        teacher = HeadRows(teacher.hidden, teacher.head, float32_logits=False)
    chunk = chunk_tokens or _chunk_tokens(student_head.weight, student_head.vocab_size, teacher, float32_logits)
    tokens = _Tokens.of(weights, labels, statistics, student_head.weight.device, kd_factors, ce_factors, options)
    loss = _FusedLinearDivergence.apply(
        student_hidden, student_head.weight, student_head.bias, student_head.finish, teacher, objective, tokens, chunk,
        float32_logits, torch.is_grad_enabled(),
    )  # fmt: skip
    return tokens.result(loss)


def fused_linear_divergence(
    student_hidden: Float[Tensor, "tokens hidden"],
    student_head: LMHead,
    teacher_hidden: Float[Tensor, "tokens teacher_hidden"],
    teacher_head: LMHead,
    divergence: Callable[..., Tensor],
    **settings: Any,
) -> FusedLoss:
    """`fused_divergence` between two models that are given by hidden states and heads.

    Args:
        teacher_hidden: Of the same tokens as `student_hidden`; its width may differ.
        settings: Further arguments of `fused_divergence`; `weights` is required.
    """
    return fused_divergence(
        student_hidden, student_head, HeadRows(teacher_hidden, teacher_head), divergence, **settings
    )


def divergence_of_logits(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher: TeacherRows | Float[Tensor, "tokens teacher_vocab"] | None,
    divergence: Callable[..., Tensor],
    *,
    weights: Float[Tensor, " tokens"],
    labels: Int[Tensor, " tokens"] | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    kd_factors: Float[Tensor, " tokens"] | None = None,
    ce_factors: Float[Tensor, " tokens"] | None = None,
    statistics: bool = False,
    **options: Any,
) -> FusedLoss:
    """The same loss where the student's logits exist already, because its head is adapted or quantized.

    Arguments, result and limits are those of `fused_divergence`. Beside the logits one more tensor of their
    size lives, their gradient. A tensor stands for the teacher's logits (`LogitRows`).
    """
    teacher = LogitRows(teacher) if isinstance(teacher, Tensor) else teacher
    objective = _Objective(divergence, kd_weight, ce_weight, temperature, options)
    _check(len(student_logits), student_logits.shape[1], teacher, labels, statistics, objective)
    tokens = _Tokens.of(weights, labels, statistics, student_logits.device, kd_factors, ce_factors, options)
    chunk = _chunk_tokens(student_logits, student_logits.shape[1], teacher)
    loss = _DivergenceOfLogits.apply(student_logits, teacher, objective, tokens, chunk, torch.is_grad_enabled())
    return tokens.result(loss)


class _Objective(NamedTuple):
    """What is minimized for each token: kd_weight * divergence + ce_weight * cross entropy."""

    divergence: Callable[..., Tensor]
    kd_weight: float
    ce_weight: float
    temperature: float
    options: dict[str, Any]


@dataclass
class _Tokens:
    """What stands beside each token: its weight and label, and room for what is found out about it."""

    weights: Float[Tensor, " tokens"]
    labels: Int[Tensor, " tokens"] | None
    kd: Float[Tensor, " tokens"]
    ce: Float[Tensor, " tokens"]
    statistics: TokenStatistics | None
    kd_factors: Float[Tensor, " tokens"] | None = None
    ce_factors: Float[Tensor, " tokens"] | None = None
    options: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        weights: Tensor,
        labels: Tensor | None,
        statistics: bool,
        device: torch.device,
        kd_factors: Tensor | None,
        ce_factors: Tensor | None,
        options: dict[str, Any],
    ) -> _Tokens:
        room = torch.zeros(4 if statistics else 2, len(weights), device=device)
        return _Tokens(
            weights.detach().to(device, torch.float32),
            None if labels is None else labels.to(device),
            room[0],
            room[1],
            TokenStatistics(room[2], room[3]) if statistics else None,
            None if kd_factors is None else kd_factors.detach().to(device, torch.float32),
            None if ce_factors is None else ce_factors.detach().to(device, torch.float32),
            {name: one.detach().to(device) for name, one in options.items() if isinstance(one, Tensor)},
        )

    def __getitem__(self, part: slice) -> _Tokens:
        """Views of a slice."""
        labels = None if self.labels is None else self.labels[part]
        found = None if self.statistics is None else TokenStatistics(*(values[part] for values in self.statistics))
        kd_factors, ce_factors = (None if one is None else one[part] for one in (self.kd_factors, self.ce_factors))
        options = {name: one[part] for name, one in self.options.items()}
        return _Tokens(
            self.weights[part], labels, self.kd[part], self.ce[part], found, kd_factors, ce_factors, options
        )

    def total(self, objective: _Objective) -> Float[Tensor, ""]:
        """The loss. A sum over no token is 0, and the infinite loss of a token without weight stays out."""
        kd, ce = _times(self.kd, self.kd_factors), _times(self.ce, self.ce_factors)
        values = objective.kd_weight * kd + objective.ce_weight * ce
        return torch.where(self.weights != 0, self.weights * values, 0.0).sum()

    def unit(self, objective: _Objective, finish: LogitFinish, dtype: torch.dtype) -> Float[Tensor, ""]:
        """What stored gradients are divided by, so that they have their natural size whatever the weights are.

        A token's share of a mean, 1 / tokens, would push them below the smallest float16. It comes back, with the
        incoming gradient (and the scale of a gradient scaler in it), in the backward pass.
        """
        largest = self.weights.abs().amax() if len(self.weights) else self.weights.new_ones(())
        kd, ce = (
            1.0 if one is None or not len(one) else one.abs().amax() for one in (self.kd_factors, self.ce_factors)
        )
        unit = largest * abs(finish.scale) * (objective.kd_weight * kd + objective.ce_weight * ce)
        gain = FLOAT16_GAIN if dtype == torch.float16 else 1.0
        return torch.where(unit > 0, unit / gain, 1.0)

    def result(self, loss: Tensor) -> FusedLoss:
        return FusedLoss(loss, self.kd, self.ce, self.statistics)


def _times(values: Tensor, factors: Tensor | None) -> Tensor:
    """`values * factors`, row by row; 0 where a factor is 0, even of an infinite value."""
    if factors is None:
        return values
    factors = factors.view(-1, *[1] * (values.dim() - 1))
    return torch.where(factors != 0, values * factors, 0.0)


def _scale_rows(values: ZRows, factors: PerRow) -> ZRows:
    """`_times` in place."""
    values.mul_(factors[:, None])
    without = factors == 0
    if without.is_cuda or bool(without.any()):  # on a GPU the question would wait for it
        values.masked_fill_(without[:, None], 0.0)
    return values


def _chunk_tokens(student: Tensor, vocab: int, teacher: TeacherRows | None, float32_logits: bool = True) -> int:
    """Tokens whose logits exist at once: as many as fit in `CHUNK_BYTES` for either model."""
    elements = max(vocab, 0 if teacher is None else teacher.row_elements)
    own = projection_dtype(student).itemsize
    logits = wide_dtype(projection_dtype(student)).itemsize if float32_logits else own
    row_bytes = elements * (logits if own == logits else logits + own // 2)  # half of a gradient for each model
    return max(1, CHUNK_BYTES.get(student.device.type, CHUNK_BYTES_GPU) // row_bytes)


def _check(
    tokens: int,
    vocab: int,
    teacher: TeacherRows | None,
    labels: Tensor | None,
    statistics: bool,
    objective: _Objective,
) -> None:
    if (objective.ce_weight or statistics) and labels is None:
        raise ValueError(
            f"`ce_weight` is {objective.ce_weight} and `statistics` {statistics}, which needs `labels`. Give them, or "
            "set `ce_weight=0` and `statistics=False`."
        )
    if not objective.temperature > 0:
        raise ValueError(f"`temperature` has to be > 0, got {objective.temperature}.")
    if not objective.kd_weight:
        return
    if teacher is None:
        raise ValueError(f"`kd_weight` is {objective.kd_weight}, which needs a teacher. Give its rows, or 0.")
    if len(teacher) != tokens:
        raise ValueError(
            f"Student and teacher have to see the same tokens, got {tokens} and {len(teacher)} of them. Select the "
            "tokens of both with one mask."
        )
    _check_form(teacher, vocab, objective)


def _check_form(teacher: TeacherRows, vocab: int, objective: _Objective) -> None:
    require_form(objective.divergence, teacher.form)
    for member in teacher.members if isinstance(teacher, CombinedRows) else ():
        _check_form(member, vocab, objective)
    if isinstance(teacher, (SparseRows, SampledRows)):
        if teacher.temperature != objective.temperature:
            raise ValueError(
                f"The teacher's {teacher.form} rows were taken at temperature {teacher.temperature}, but the loss has "
                f"`temperature={objective.temperature}`: what is not listed cannot be changed afterwards. Use the "
                "same one."
            )
        ids = teacher.top.ids if isinstance(teacher, SparseRows) else teacher.listed.ids
        if ids.numel() and int(ids.max()) >= vocab:
            raise ValueError(
                f"The teacher's rows list token {int(ids.max())}, but the student has {vocab} vocabulary "
                "entries. Both have to share one vocabulary."
            )


class _FusedLinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        finish: LogitFinish,
        teacher: TeacherRows | None,
        objective: _Objective,
        tokens: _Tokens,
        chunk: int,
        float32_logits: bool,
        with_gradient: bool,
    ) -> Tensor:
        needs = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        student = Projection(hidden, LMHead(weight, bias), float32_logits)
        teacher_rows, teacher_finish = _opened(teacher, objective)
        unit = tokens.unit(objective, finish, student.dtype)
        gradients = ChunkGradients(needs, hidden, weight, bias)
        keep_freed_memory()
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, min(start + chunk, len(hidden)))
                logits = student(part)
                block = None if teacher_rows is None else teacher_rows(part).to(logits.device)
                gradient = _like(logits, student.dtype) if any(needs) else None
                _rows(logits, finish, block, teacher_finish, tokens[part], objective, gradient, unit)
                if gradient is not None:
                    gradients.add(part, gradient, student)
        ctx.unit, ctx.grads = unit, gradients.with_dtypes()
        return tokens.total(objective)

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*consumed(ctx, d_loss[0]), None, None, None, None, None, None, None)


def _like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the gradient of these logits: their own where it has this dtype, since rows are read before that."""
    return logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)


class _DivergenceOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: TeacherRows | None,
        objective: _Objective,
        tokens: _Tokens,
        chunk: int,
        with_gradient: bool,
    ) -> Tensor:
        teacher_rows, teacher_finish = _opened(teacher, objective)
        unit = tokens.unit(objective, LogitFinish(), logits.dtype)
        gradient = torch.empty_like(logits) if with_gradient and ctx.needs_input_grad[0] else None
        keep_freed_memory()
        with torch.autocast(logits.device.type, enabled=False):
            for start in range(0, len(logits), chunk):
                part = slice(start, min(start + chunk, len(logits)))
                block = None if teacher_rows is None else teacher_rows(part).to(logits.device)
                into = None if gradient is None else gradient[part]
                _rows(logits[part], LogitFinish(), block, teacher_finish, tokens[part], objective, into, unit)
        ctx.unit = unit
        ctx.grads = ((gradient, logits.dtype),)
        return tokens.total(objective)

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*consumed(ctx, d_loss[0]), None, None, None, None, None)


def _opened(teacher: TeacherRows | None, objective: _Objective) -> tuple[Callable[[slice], Block] | None, LogitFinish]:
    """The reader of a teacher's rows and what is left to do to them; a teacher that is not needed is not read."""
    if teacher is None or not objective.kd_weight:
        return None, LogitFinish()
    return teacher.reader(), teacher.finish


def consumed(ctx: Any, d_loss: Tensor) -> list[Tensor | None]:
    """The gradients of the forward pass times the loss's own; they are scaled in place, so there is no second time."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The fused loss has no second derivative: its gradients are computed in the forward pass, and are "
            "constants. Take the plain formula on full logits for `create_graph=True`."
        )
    if ctx.grads is None:
        raise RuntimeError(
            "Gradients of the fused loss are consumed by the first backward pass; a second one needs a second forward."
        )
    grads, ctx.grads = ctx.grads, None
    return [None if grad is None else grad.mul_(d_loss * ctx.unit).to(dtype) for grad, dtype in grads]


class ChunkGradients:
    """Gradients of hidden states and head, gathered from those of the projected logits, a chunk of rows at a time.

    Args:
        needs: Whether the gradients of `hidden`, `weight` and `bias` are needed.
        hidden: The student's states, or its logits where there is no head (`weight` is None).
    """

    def __init__(self, needs: Sequence[bool], hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        own = hidden.dtype if weight is None else weight.dtype
        self.dtypes = (hidden.dtype, own, own if bias is None else bias.dtype)
        self.hidden = torch.zeros_like(hidden) if needs[0] else None
        self.head: Tensor | None = None
        if needs[1] and weight is not None:
            self.head = torch.zeros_like(weight, dtype=wide_dtype(weight.dtype))
        self.bias = torch.zeros(len(weight), device=weight.device) if needs[2] and weight is not None else None

    def add(self, rows: slice, d_logits: Tensor, projection: Projection | None) -> None:
        """Add those of the rows, whose logits are projected from `projection.hidden[rows]`, or are the states."""
        if self.hidden is not None:
            own = d_logits if projection is None else d_logits @ projection.weight
            self.hidden[rows] = own.to(self.hidden.dtype)
        if self.head is not None and projection is not None:
            _add_outer(self.head, d_logits, projection.hidden[rows])
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=torch.float32)

    def with_dtypes(self) -> tuple[tuple[Tensor | None, torch.dtype], ...]:
        """What `consumed` returns to autograd: each gradient, and the dtype that it has to get."""
        return tuple(zip((self.hidden, self.head, self.bias), self.dtypes, strict=True))


def _add_outer(gradient: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """gradient += d_logits.T @ hidden, summed over chunks in the dtype of `gradient`."""
    if gradient.dtype == d_logits.dtype:
        gradient.addmm_(d_logits.T, hidden)
        return
    for rows in head_row_slices(gradient):
        left = d_logits[:, rows].T
        # In float16 the product could overflow.
        gradient[rows] += wide_product(left, hidden) if left.dtype == torch.float16 else left @ hidden


def _rows(
    projected: ZRows,
    finish: LogitFinish,
    block: Block | None,
    teacher_finish: LogitFinish,
    tokens: _Tokens,
    objective: _Objective,
    gradient: ZRows | None,
    unit: Float[Tensor, ""],
) -> None:
    """Note divergence and cross entropy of a chunk's tokens, a few at a time, and write d loss / d projected / unit.

    Args:
        projected: The student's projected logits, before `finish`.
        block: The teacher's rows, before `teacher_finish`.
        gradient: Where the gradient is written; may be `projected` itself. None: it is not needed.
    """
    for part in _row_slices(projected):
        few = tokens[part]
        z = finish(projected[part].float())
        teacher = None if block is None else block[part]
        d_z = _losses(z, teacher, teacher_finish, few, objective, gradient is not None)
        if gradient is None:
            continue
        if finish.softcap is not None:
            d_z.mul_(1.0 - (z / finish.softcap).square())
        gradient[part] = _scale_rows(d_z, few.weights * (finish.scale / unit))
        del z, d_z  # before the next rows need their memory


def _losses(
    z: ZRows,
    teacher: Block | None,
    teacher_finish: LogitFinish,
    tokens: _Tokens,
    objective: _Objective,
    with_gradient: bool,
) -> ZRows:
    """Note the losses of a few rows of the student's logits z; the gradient of kd_weight * D + ce_weight * CE in z."""
    d_z = own = None
    if teacher is not None:
        if tokens.options:
            columns = {name: one[:, None] for name, one in tokens.options.items()}
            objective = objective._replace(options={**objective.options, **columns})
        value, d_z, own = _divergence(z, teacher, teacher_finish, objective)
        tokens.kd.copy_(value)
        d_z = d_z if objective.kd_weight == 1 else d_z.mul_(objective.kd_weight)
        d_z = _times(d_z, tokens.kd_factors)
    if tokens.labels is not None:
        own = own or _outcomes(z, 1.0)
        tokens.ce.copy_(-own.log.gather(1, tokens.labels[:, None]).squeeze(1))
        if tokens.statistics is not None:
            tokens.statistics.entropy.copy_(-weighted_sum(own.probs, own.log))
            tokens.statistics.correct.copy_(own.log.argmax(-1) == tokens.labels)
        if objective.ce_weight and with_gradient:
            d_ce = own.probs  # its last reader
            d_ce[torch.arange(len(d_ce), device=d_ce.device), tokens.labels] -= 1.0
            d_ce = _times(d_ce, tokens.ce_factors)
            alpha = objective.ce_weight
            d_z = d_ce.mul_(alpha) if d_z is None else d_z.add_(d_ce, alpha=alpha)
    return torch.zeros_like(z) if d_z is None else d_z


def _row_slices(logits: Tensor) -> Iterator[slice]:
    """Slices of a few rows each, which the processor's cache can hold."""
    rows = max(1, BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS_GPU) // logits.shape[1])
    if logits.device.type == "cpu":
        threads = torch.get_num_threads()
        rows = max(threads, rows // threads * threads)  # a row is one thread's work
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def _divergence(
    z: ZRows, block: Block, teacher_finish: LogitFinish, objective: _Objective
) -> tuple[PerRow, ZRows, Outcomes | None]:
    """Divergence of a few rows, its gradient with respect to the student's logits z, and softmax(z) if at hand."""
    if isinstance(block, CombinedBlock):
        return _of_members(z, block, objective)
    if isinstance(block, TopTokens):
        value, gradient, own = _with_ghost_tail(z, block, objective)
        return value, gradient, own if objective.temperature == 1 else None
    if isinstance(block, SampledTokens):
        value, gradient, own = _estimated(z, block, objective)
        return value, gradient, own if objective.temperature == 1 else None
    vocab, shared = z.shape[1], min(z.shape[1], block.shape[1])
    value, gradient, found = _dense(z[:, :shared], teacher_finish(block[:, :shared].float()), objective)
    if shared < vocab:
        return value, torch.nn.functional.pad(gradient, (0, vocab - shared)), None
    return value, gradient, found if objective.temperature == 1 else None


def _of_members(z: ZRows, block: CombinedBlock, objective: _Objective) -> tuple[PerRow, ZRows, Outcomes | None]:
    """Weighted sum of the divergences from several teachers, each over its own rows in its own form."""
    value, gradient, own = z.new_zeros(len(z)), torch.zeros_like(z), None
    for one in block.members:
        of_all = len(one.places) == len(z)
        rows: Any = slice(None) if of_all else one.places.to(z.device)
        options = {name: of[rows] if isinstance(of, Tensor) else of for name, of in objective.options.items()}
        found, d_z, of_member = _divergence(z[rows], one.block, one.finish, objective._replace(options=options))
        value[rows] += _times(found, one.weights)
        gradient[rows] += _scale_rows(d_z, one.weights)
        own = of_member if of_all else own
    return value, gradient, own


def _dense(z: ZRows, teacher_logits: ZRows, objective: _Objective) -> tuple[PerRow, ZRows, Outcomes | None]:
    """The divergence over one vocabulary: value, gradient, and softmax(z / temperature) if at hand."""
    temperature = objective.temperature
    slope_of = SLOPES.get(objective.divergence)
    if slope_of is None:
        return *_by_autograd(z, teacher_logits, temperature, objective), None
    student = _outcomes(z, temperature)
    value, slope = slope_of(student, _outcomes(teacher_logits, temperature), **objective.options)
    return value, logit_gradient(student, slope, temperature), student


def _with_ghost_tail(z: ZRows, top: TopTokens, objective: _Objective) -> tuple[PerRow, ZRows, Outcomes]:
    r"""The divergence over the listed tokens and one bucket for all the others, on both sides.

    .. math:: D(Q, P), \quad Q = (q_1, \dots, q_k, 1 - \sum_i q_i), \quad P = (p_1, \dots, p_k, p_{tail})

    Merging outcomes never raises a divergence of this kind: the value is at most that over the whole vocabulary.
    With S the slopes of D(Q, P), a listed token has its own, and any other token v the share of the bucket's that it
    has of its mass, :math:`s_v = S_{tail} \, q_v / q_{tail}`.
    """
    own = _outcomes(z, objective.temperature)
    # The mass of the others from themselves: 1 - sum would lose a small one.
    log_tail = own.log.scatter(1, top.ids, -torch.inf).logsumexp(1, keepdim=True)
    log_student = torch.cat([own.log.gather(1, top.ids), log_tail], 1)
    log_teacher = torch.cat([top.log_probs, top.tail.log()[:, None]], 1)
    slope_of = SLOPES.get(objective.divergence)
    if slope_of is not None:
        value, bucket_slope = slope_of(Outcomes(log_student), Outcomes(log_teacher), **objective.options)
    else:  # of log-probabilities as logits: their gradient is the slope less q times its sum, which the rule cancels
        value, bucket_slope = _by_autograd(log_student, log_teacher, 1.0, objective)
    share = torch.where(log_tail > -torch.inf, (own.log - log_tail).exp(), 0.0)
    slope = share.mul_(bucket_slope[:, -1:]).scatter_(1, top.ids, bucket_slope[:, :-1])
    return value, logit_gradient(own, slope, objective.temperature), own


def _estimated(z: ZRows, listed: SampledTokens, objective: _Objective) -> tuple[PerRow, ZRows, Outcomes]:
    """The divergence as a weighted sum over the listed tokens, each an outcome of its own.

    The gradient is linear in the slopes, so weighted slopes, right in expectation, give one that is.
    """
    own = _outcomes(z, objective.temperature)
    student = Outcomes(own.log.gather(1, listed.ids).reshape(-1, 1))
    width = listed.ids.shape[1]
    options = {
        name: value.repeat_interleave(width, 0) if isinstance(value, Tensor) else value
        for name, value in objective.options.items()
    }
    teacher = Outcomes(listed.log_probs.reshape(-1, 1))
    terms, slopes = SLOPES[objective.divergence](student, teacher, **options)
    counts, factors = listed.factors > 0, listed.factors
    value = torch.where(counts, factors * terms.view_as(factors), 0.0).sum(1)
    slope = torch.where(counts, factors * slopes.view_as(factors), 0.0)
    slope = torch.zeros_like(own.log).scatter_add_(1, listed.ids, slope)
    return value, logit_gradient(own, slope, objective.temperature), own


def _outcomes(logits: ZRows, temperature: float) -> Outcomes:
    return Outcomes((logits if temperature == 1 else logits / temperature).log_softmax(-1), normalized=True)


def _by_autograd(z: ZRows, teacher_logits: ZRows, temperature: float, objective: _Objective) -> tuple[PerRow, ZRows]:
    """Value and gradient of a formula that states no slope, on a few rows."""
    with torch.enable_grad():
        leaf = z.detach()[None].requires_grad_()
        per_token = objective.divergence(leaf, teacher_logits[None], temperature=temperature, **objective.options)
        (gradient,) = torch.autograd.grad(per_token.sum(), leaf)
    return per_token.detach()[0], gradient[0]
