"""The contract of a token divergence, as a check that code outside the package can call on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_transfer_ext.losses.fused import divergence_of_logits, fused_divergence
from hf_transfer_ext.losses.rows import (
    CombinedRows,
    HeadRows,
    LogitRows,
    SampledRows,
    SampledTokens,
    SparseRows,
    TeacherRows,
)
from hf_transfer_ext.losses.slopes import ALL_FORMS, check_signature, forms_of
from hf_transfer_ext.models.heads import LMHead

CHUNKS = (1, 2, 4, 7, 100)


def check_divergence(divergence: Callable[..., Tensor], *, minimum: float = 0.0, **options: Any) -> None:
    """Hold a divergence to what `DistillationConfig(loss=...)` relies on.

    - Its signature is `(student_logits, teacher_logits, *, temperature=1.0, **own options with defaults)`, its
      docstring names a `Source:`, and the forms that it declares exist.
    - It gives one value per token, `minimum` where both models agree, never less elsewhere, and does not change when a
      number is added to all logits of a token.
    - `temperature` divides both models' logits.
    - Value and gradient are those of the formula in float64, in both ways through the fused core and for every form;
      so a slope that does not belong to its formula is found.
    - With sampled rows they have the expectation that dense rows give, over all draws that can occur.
    - Where it accepts mixtures, the weighted sum over teachers has the gradient of the teachers' mixture.
    - They are the same for all sizes of a chunk.
    - They are finite for wide logits, and a token that both models exclude (-inf) changes nothing.

    Args:
        minimum: The value where both models agree.
        options: The divergence's own options to check it with; by default its own defaults.

    Raises:
        AssertionError: A promise is broken; the message says which one, and shows the numbers.
    """
    name = getattr(divergence, "__name__", repr(divergence))
    try:
        check_signature(divergence)
    except ValueError as error:
        raise AssertionError(str(error)) from error
    forms = forms_of(divergence)
    if not forms or any(form not in ALL_FORMS for form in forms):
        raise AssertionError(f"{name} declares the forms {forms}; there are {', '.join(ALL_FORMS)}.")

    student, teacher = _logits(0), _logits(1)
    value = divergence(student[None], teacher[None], **options)
    _require(value.shape == (1, len(student)), f"{name} has to give one value per token, got {tuple(value.shape)}.")
    same = divergence(student[None], student[None].clone(), **options)
    _close(same, torch.full_like(same, minimum), f"{name} of a model from itself has to be {minimum}", atol=1e-6)
    wider = divergence(5 * student[None], 5 * teacher[None], **options)
    _require(
        bool((wider >= minimum - 1e-5).all()), f"{name} is less than its minimum {minimum}: {wider.min().item()}."
    )
    shifted = divergence(student[None] + 3.0, teacher[None] - 7.0, **options)
    _close(shifted, value, f"{name} has to ignore a number added to all logits", rtol=1e-3, atol=1e-5)
    warm = divergence(student[None], teacher[None], temperature=2.5, **options)
    divided = divergence(student[None] / 2.5, teacher[None] / 2.5, **options)
    _close(warm, divided, f"`temperature` of {name} has to divide both models' logits")
    for temperature in (1.0, 1.7):
        _check_numbers(name, divergence, temperature, options)
    if "sampled" in forms:
        _check_expectation(name, divergence, options)
    if "mixture" in forms:
        _check_mixture(name, divergence, options)
    _check_extremes(name, divergence, options)


def _logits(seed: int, tokens: int = 9, vocab: int = 23, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed))


def _check_numbers(name: str, divergence: Callable[..., Tensor], temperature: float, options: dict[str, Any]) -> None:
    """Value and gradient in every form and size of chunk against the formula in float64."""
    generator = torch.Generator().manual_seed(2)
    hidden, states = (torch.randn(9, 6, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(23, 6, generator=generator) for _ in range(2))
    weights = torch.rand(9, generator=generator)
    teacher_logits = states @ teacher_weight.T
    teachers: list[tuple[str, TeacherRows]] = []
    if "dense" in forms_of(divergence):
        teachers += [("dense", HeadRows(states, LMHead(teacher_weight))), ("dense", LogitRows(teacher_logits))]
    if "sparse" in forms_of(divergence):
        teachers.append(("sparse", SparseRows.from_logits(teacher_logits, 5, temperature=temperature)))
    for form, rows in teachers:
        h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
        z = h @ w.T
        value, d_z = _by_definition(divergence, z.detach(), teacher_logits.double(), rows, temperature, options)
        (z * d_z * weights.double()[:, None]).sum().backward()
        for chunk in CHUNKS:
            own, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            fused = fused_divergence(
                own, LMHead(head), rows, divergence, weights=weights, temperature=temperature, chunk_tokens=chunk,
                **options,
            )  # fmt: skip
            fused.loss.backward()
            where = f"with {form} rows, temperature {temperature} and chunks of {chunk} tokens"
            _close(fused.divergence, value, f"The value of {name} differs from its formula in float64 {where}")
            for got, expected in ((own.grad, h.grad), (head.grad, w.grad)):
                _close(got, expected, f"The gradient of {name} differs from autograd in float64 {where}", atol=1e-4)
        logits = z.detach().float().requires_grad_()
        on_logits = divergence_of_logits(logits, rows, divergence, weights=weights, temperature=temperature, **options)
        on_logits.loss.backward()
        _close(logits.grad, d_z * weights[:, None], f"The gradient of {name} in the logits is wrong", atol=1e-5)


def _by_definition(
    divergence: Callable[..., Tensor],
    z: Tensor,
    teacher_logits: Tensor,
    rows: TeacherRows,
    temperature: float,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Value and gradient in z by autograd in float64. The formula itself may compute in float32."""
    leaf = z.clone().requires_grad_()
    if isinstance(rows, SparseRows):
        log_q = (leaf / temperature).log_softmax(-1)
        rest = log_q.scatter(1, rows.top.ids, -math.inf).logsumexp(1, keepdim=True)
        student = torch.cat([log_q.gather(1, rows.top.ids), rest], 1)
        teacher = torch.cat([rows.top.log_probs, rows.top.tail.log()[:, None]], 1).double()
        value = divergence(student[None], teacher[None], temperature=1.0, **options)[0]
    else:
        value = divergence(leaf[None], teacher_logits[None], temperature=temperature, **options)[0]
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def _check_expectation(name: str, divergence: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Value and gradient of one draw, averaged over every token that can be drawn, against dense rows."""
    student, teacher = _logits(4, 1, 6), _logits(5, 1, 6)
    log_p = teacher.log_softmax(-1)[0]
    listed, others = log_p.argsort(descending=True).split([2, 4])
    value, gradient = torch.zeros(1), torch.zeros_like(student)
    chances = log_p[others].softmax(-1)
    for drawn, chance in zip(others, chances, strict=True):
        ids = torch.cat([listed, drawn[None]])
        rows = SampledRows(
            SampledTokens(ids[None], log_p[ids][None], torch.stack([*chances.new_ones(2), 1 / chance])[None])
        )
        leaf = student.clone().requires_grad_()
        fused = divergence_of_logits(leaf, rows, divergence, weights=torch.ones(1), **options)
        fused.loss.backward()
        assert leaf.grad is not None
        value += chance * fused.divergence
        gradient += chance * leaf.grad
    leaf = student.clone().requires_grad_()
    dense = divergence(leaf[None], teacher[None], **options)[0]
    (expected,) = torch.autograd.grad(dense.sum(), leaf)
    _close(value, dense, f"The expected value of {name} over all draws differs from that of dense rows")
    _close(gradient, expected, f"The expected gradient of {name} over all draws differs from that of dense rows")


def _check_mixture(name: str, divergence: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """The gradient of a weighted sum over two teachers against that of the mixture of their probabilities."""
    student, first, second = (_logits(seed) for seed in (6, 7, 8))
    shares = torch.rand(len(student), 2, generator=torch.Generator().manual_seed(9)).softmax(1)
    mixture = (shares[:, :1] * first.softmax(-1) + shares[:, 1:] * second.softmax(-1)).log()
    gradients: list[Tensor | None] = []
    for rows in (CombinedRows.mixed([LogitRows(first), LogitRows(second)], shares), LogitRows(mixture)):
        leaf = student.clone().requires_grad_()
        divergence_of_logits(leaf, rows, divergence, weights=torch.ones(len(leaf)), **options).loss.backward()
        gradients.append(leaf.grad)
    message = f"{name} accepts mixtures, but its weighted sum over two teachers has another gradient"
    _close(gradients[0], gradients[1], message)


def _check_extremes(name: str, divergence: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Wide logits, and tokens that both models exclude."""
    dense = "dense" in forms_of(divergence)

    def core(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        rows = LogitRows(teacher) if dense else SparseRows.from_logits(teacher, 5)
        fused = divergence_of_logits(leaf, rows, divergence, weights=torch.ones(len(leaf)), **options)
        fused.loss.backward()
        assert leaf.grad is not None
        return fused.divergence, leaf.grad

    for spread in (104.0, 1000.0):
        wide = torch.linspace(0, -spread, 400)[None]
        value, gradient = core(wide, wide + 0.1 * _logits(3, 1, 400, 1.0))
        finite = bool(value.isfinite().all() and gradient.isfinite().all())
        _require(
            finite, f"{name} is {value.item()} for logits over {spread:g} nats, or has a gradient that is not finite."
        )
    student, teacher = _logits(0), _logits(1)
    value, gradient = core(student, teacher)
    closed = torch.full((len(student), 3), -math.inf)
    masked, masked_gradient = core(torch.cat([student, closed], 1), torch.cat([teacher, closed], 1))
    _close(masked, value, f"A token that both models exclude (-inf) changes the value of {name}")
    expected = torch.cat([gradient, torch.zeros_like(closed)], 1)
    _close(masked_gradient, expected, f"A token that both models exclude (-inf) changes the gradient of {name}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _close(got: Tensor | None, expected: Tensor | None, message: str, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    """Both are compared in float64; the message shows where they differ most."""
    if got is None or expected is None:
        raise AssertionError(f"{message}: there is none.")
    torch.testing.assert_close(
        got.detach().double(), expected.detach().double(), rtol=rtol, atol=atol,
        msg=lambda numbers: f"{message}. {numbers}",
    )  # fmt: skip
