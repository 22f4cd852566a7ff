"""The fused core against the formulas on full logits, and against float64 definitions."""

import math
import platform
import subprocess
import sys

import oracles
import pytest
import torch

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import divergence_of_logits, fused_divergence, fused_linear_divergence
from hf_transfer_ext.losses.rows import HeadRows, LogitRows
from hf_transfer_ext.models.heads import LMHead, LogitFinish

TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 9, 6, 5, 23


def problem(dtype=torch.float32, bias=True, scale=1.0, softcap=None, vocab=VOCAB, teacher_vocab=VOCAB, tokens=TOKENS):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    finish = LogitFinish(scale, softcap)
    student = LMHead(rand(vocab, WIDTH).requires_grad_(), rand(vocab).requires_grad_() if bias else None, finish)
    teacher = LMHead(rand(teacher_vocab, TEACHER_WIDTH), rand(teacher_vocab) if bias else None, finish)
    hidden, teacher_hidden = rand(tokens, WIDTH).requires_grad_(), rand(tokens, TEACHER_WIDTH)
    labels = torch.randint(min(vocab, teacher_vocab), (tokens,), generator=g)
    weights = torch.rand(tokens, generator=g)
    return hidden, student, teacher_hidden, teacher, labels, weights


def by_formula(
    hidden, student, teacher_hidden, teacher, labels, weights, name, kd_weight, ce_weight, temperature, options
):
    """The same loss from full logits, by autograd."""
    z, t = student.logits(hidden).float()[None], teacher.logits(teacher_hidden).float()[None]
    shared = min(z.shape[-1], t.shape[-1])
    kd = DISTILLATION_LOSSES[name](z[..., :shared], t[..., :shared], temperature=temperature, **options)[0]
    ce = torch.nn.functional.cross_entropy(z[0], labels, reduction="none")
    return (weights * (kd_weight * kd + ce_weight * ce)).sum(), kd.detach(), ce.detach()


def gradients(loss, hidden, student):
    leaves = [x for x in (hidden, student.weight, student.bias) if x is not None and x.requires_grad]
    return torch.autograd.grad(loss, leaves)


def check(case, name, kd_weight=0.7, ce_weight=0.3, temperature=1.0, chunk_tokens=4, rtol=2e-4, atol=2e-5, **options):
    hidden, student, teacher_hidden, teacher, labels, weights = case
    fused = fused_divergence(
        hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES[name], weights=weights, labels=labels,
        kd_weight=kd_weight, ce_weight=ce_weight, temperature=temperature, chunk_tokens=chunk_tokens, **options,
    )  # fmt: skip
    loss, kd, ce = by_formula(*case, name, kd_weight, ce_weight, temperature, options)
    torch.testing.assert_close(fused.loss, loss, rtol=rtol, atol=atol)
    if kd_weight:
        torch.testing.assert_close(fused.divergence, kd, rtol=rtol, atol=atol)
    torch.testing.assert_close(fused.cross_entropy, ce, rtol=rtol, atol=atol)
    for got, want in zip(gradients(fused.loss, hidden, student), gradients(loss, hidden, student), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("name, options", oracles.CASES)
def test_value_and_gradient_equal_the_formula_at_every_chunk_size(name, options, chunk_tokens):
    check(problem(), name, chunk_tokens=chunk_tokens, **options)


@pytest.mark.parametrize("name, options", oracles.CASES)
def test_value_and_gradient_equal_the_float64_definition(name, options):
    hidden, student, teacher_hidden, teacher, labels, weights = problem(tokens=2, vocab=7, teacher_vocab=7)
    fused = fused_divergence(
        hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES[name], weights=weights, labels=labels,
        kd_weight=0.7, ce_weight=0.3, temperature=1.5, chunk_tokens=1, **options,
    )  # fmt: skip
    t = teacher_hidden.double() @ teacher.weight.double().T + teacher.bias.double()

    def definition(h):
        # The weights of adaptive_kl are constants of its gradient, so its definition is differentiated apart, below.
        z = h.view(2, WIDTH) @ student.weight.detach().double().T + student.bias.detach().double()
        total = 0.0
        for i in range(2):
            kd = oracles.value(name, z[i], t[i], 1.5, **options)
            ce = -math.log(oracles.probabilities(z[i])[labels[i]])
            total += weights[i].item() * (0.7 * kd + 0.3 * ce)
        return total

    assert fused.loss.item() == pytest.approx(definition(hidden.detach().double()), rel=1e-5)
    if name != "adaptive_kl":
        (got,) = torch.autograd.grad(fused.loss, hidden)
        want = oracles.slope_of(definition, hidden.detach().reshape(-1)).view_as(hidden)
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_temperature_divides_the_divergence_alone(name, temperature):
    check(problem(), name, temperature=temperature)


@pytest.mark.parametrize("kd_weight, ce_weight", [(1.0, 0.0), (0.0, 1.0), (2.5, 0.4)])
def test_each_part_alone(kd_weight, ce_weight):
    check(problem(), "forward_kl", kd_weight=kd_weight, ce_weight=ce_weight)


@pytest.mark.parametrize("scale, softcap", [(1.0, 4.0), (0.25, None), (3.0, 2.0)])
@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_logit_scale_and_softcap_are_part_of_the_head(name, scale, softcap):
    check(problem(scale=scale, softcap=softcap), name)


@pytest.mark.parametrize("vocab, teacher_vocab", [(23, 29), (29, 23)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_rows_of_the_larger_vocabulary_take_no_part(vocab, teacher_vocab, temperature):
    check(problem(vocab=vocab, teacher_vocab=teacher_vocab), "forward_kl", temperature=temperature)
    check(problem(vocab=vocab, teacher_vocab=teacher_vocab), "generalized_jsd", temperature=temperature)


def test_without_bias_and_with_a_frozen_head():
    case = problem(bias=False)
    check(case, "reverse_kl")
    case[1].weight.requires_grad_(False)
    check(case, "reverse_kl")


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_bfloat16_sums_in_float32(name):
    """Projections round as the model's own do; the divergence itself is taken in float32."""
    check(problem(torch.bfloat16), name, rtol=0.05, atol=0.02)


def test_the_head_gradient_of_many_bfloat16_chunks_does_not_lose_small_terms():
    hidden, student, teacher_hidden, teacher, _, _ = problem(torch.bfloat16, bias=False, tokens=4096)
    weights = torch.full((4096,), 1 / 4096)
    grads = []
    for chunk in (1, 4096):
        loss = fused_divergence(
            hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES["forward_kl"], weights=weights,
            chunk_tokens=chunk,
        ).loss  # fmt: skip
        grads.append(torch.autograd.grad(loss, student.weight)[0].float())
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert error < 5e-3


def test_autocast_projects_in_its_dtype_and_returns_float32_gradients():
    hidden, student, teacher_hidden, teacher, labels, weights = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fused_divergence(
            hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES["forward_kl"], weights=weights,
            labels=labels, ce_weight=0.5,
        )  # fmt: skip
    loss, _, _ = by_formula(*problem(), "forward_kl", 1.0, 0.5, 1.0, {})
    assert fused.loss.item() == pytest.approx(loss.item(), rel=0.02) and fused.loss.item() != loss.item()
    assert all(g.dtype == torch.float32 for g in gradients(fused.loss, hidden, student))


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_no_token_gives_zero_with_a_gradient(name):
    hidden, student, teacher_hidden, teacher, labels, weights = problem(tokens=0)
    loss = fused_divergence(
        hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES[name], weights=weights, labels=labels,
        ce_weight=0.5,
    ).loss  # fmt: skip
    assert loss.item() == 0.0
    assert all((g == 0).all() for g in gradients(loss, hidden, student))


def test_a_token_without_weight_adds_nothing_even_where_its_loss_is_infinite():
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    closed = student.bias.detach().clone()
    closed[3] = -math.inf
    student = LMHead(student.weight, closed.requires_grad_())
    weights = torch.zeros_like(weights)
    fused = fused_divergence(
        hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES["forward_kl"], weights=weights
    )
    assert torch.isinf(fused.divergence).all() and fused.loss.item() == 0.0
    assert all((g == 0).all() for g in gradients(fused.loss, hidden, student))


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_a_token_that_both_heads_exclude_changes_nothing(name):
    hidden, student, teacher_hidden, teacher, labels, weights = problem()
    both = []
    for width, head in ((WIDTH, student), (TEACHER_WIDTH, teacher)):
        weight = torch.cat([head.weight.detach(), torch.zeros(2, width)]).requires_grad_()
        both.append(LMHead(weight, torch.cat([head.bias.detach(), torch.full((2,), -math.inf)])))
    wide = fused_divergence(
        hidden, both[0], HeadRows(teacher_hidden, both[1]), DISTILLATION_LOSSES[name], weights=weights, labels=labels,
        ce_weight=0.3,
    )  # fmt: skip
    narrow = fused_divergence(
        hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES[name], weights=weights, labels=labels,
        ce_weight=0.3,
    )  # fmt: skip
    torch.testing.assert_close(wide.loss, narrow.loss)
    got, want = torch.autograd.grad(wide.loss, both[0].weight)[0], torch.autograd.grad(narrow.loss, student.weight)[0]
    torch.testing.assert_close(got[:VOCAB], want)
    assert (got[VOCAB:] == 0).all()


def test_a_formula_of_ones_own_works_without_a_slope():
    def squared_difference(student_logits, teacher_logits, *, temperature=1.0, factor=1.0):
        return factor * ((student_logits - teacher_logits) / temperature).square().sum(-1)

    hidden, student, teacher_hidden, teacher, _, weights = problem(softcap=3.0)
    loss = fused_divergence(
        hidden, student, HeadRows(teacher_hidden, teacher), squared_difference, weights=weights, temperature=2.0,
        chunk_tokens=2, factor=0.5,
    ).loss  # fmt: skip
    z, t = student.logits(hidden)[None], teacher.logits(teacher_hidden)[None]
    want = (weights * squared_difference(z, t, temperature=2.0, factor=0.5)[0]).sum()
    torch.testing.assert_close(loss, want)
    for got, expected in zip(gradients(loss, hidden, student), gradients(want, hidden, student), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_follows_a_factor_of_the_loss_and_is_given_once():
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    args = (hidden, student, HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES["forward_kl"])
    (one,) = torch.autograd.grad(fused_divergence(*args, weights=weights).loss, hidden)
    (three,) = torch.autograd.grad(3 * fused_divergence(*args, weights=weights).loss, hidden)
    torch.testing.assert_close(three, 3 * one)
    loss = fused_divergence(*args, weights=weights).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second forward"):
        loss.backward()


def test_bad_arguments_are_named():
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    kl, rows = DISTILLATION_LOSSES["forward_kl"], HeadRows(teacher_hidden, teacher)
    with pytest.raises(ValueError, match="needs `labels`"):
        fused_divergence(hidden, student, rows, kl, weights=weights, ce_weight=1.0)
    with pytest.raises(ValueError, match="temperature"):
        fused_divergence(hidden, student, rows, kl, weights=weights, temperature=0.0)
    with pytest.raises(ValueError, match="needs a teacher"):
        fused_divergence(hidden, student, None, kl, weights=weights)
    with pytest.raises(ValueError, match=f"same tokens, got {TOKENS} and 3"):
        fused_divergence(hidden, student, HeadRows(teacher_hidden[:3], teacher), kl, weights=weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, options", oracles.CASES)
def test_on_logits_the_loss_is_the_same(name, options, dtype):
    hidden, student, teacher_hidden, teacher, labels, weights = problem(vocab=29)
    logits = student.logits(hidden).detach().to(dtype).requires_grad_()
    teacher_logits = teacher.logits(teacher_hidden).to(dtype)
    got = divergence_of_logits(
        logits,
        LogitRows(teacher_logits),
        DISTILLATION_LOSSES[name],
        weights=weights,
        labels=labels,
        kd_weight=0.7,
        ce_weight=0.3,
        temperature=1.5,
        **options,
    )
    kd = DISTILLATION_LOSSES[name](logits[None, :, :VOCAB], teacher_logits[None], temperature=1.5, **options)[0]
    ce = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    want = (weights * (0.7 * kd + 0.3 * ce)).sum()
    torch.testing.assert_close(got.loss, want)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-3}
    torch.testing.assert_close(
        torch.autograd.grad(2 * got.loss, logits)[0], torch.autograd.grad(2 * want, logits)[0], **tolerance
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_near_the_teacher_float32_logits_keep_the_gradient_of_bfloat16_weights(name):
    """The difference of two close distributions drowns in logits that are rounded to bfloat16."""
    torch.manual_seed(0)
    t, u = torch.randn(64, 128).bfloat16(), (torch.randn(2000, 128) * 0.4).bfloat16()
    h, w = ((x.float() + 0.02 * x.float().std() * torch.randn(x.shape)).bfloat16() for x in (t, u))

    def gradients(*tensors, **options):
        own, head = (x.clone().requires_grad_() for x in tensors[:2])
        rows = HeadRows(tensors[2], LMHead(tensors[3]))
        loss = fused_divergence(
            own, LMHead(head), rows, DISTILLATION_LOSSES[name], weights=torch.full((64,), 1 / 64), **options
        ).loss
        return loss.item(), [x.double() for x in torch.autograd.grad(loss, (own, head))]

    _, exact = gradients(*(x.double() for x in (h, w, t, u)))
    value, near = gradients(h, w, t, u)
    rounded_value, rounded = gradients(h, w, t, u, float32_logits=False)
    assert value < 0.02
    errors = [
        [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)] for found in (near, rounded)
    ]
    assert max(errors[0]) < 0.01 < 0.05 < min(errors[1])
    assert rounded_value != value


@pytest.mark.parametrize("way", ["half weights", "autocast", "full logits"])
def test_float16_keeps_small_gradients_under_a_gradient_scaler(way):
    """Stored times 1 / tokens, most of a gradient would lie below the smallest float16."""
    torch.manual_seed(0)
    tokens, hidden, vocab, scale = 4096, 32, 1000, 65536.0
    h, w = torch.randn(tokens, hidden), torch.randn(vocab, hidden) * 0.15
    t, weights = h + 0.3 * torch.randn(tokens, hidden), torch.full((tokens,), 1 / tokens)
    x, y = h.half().double().requires_grad_(), w.half().double().requires_grad_()
    q, p = (x @ y.T).log_softmax(-1), (t.half().double() @ w.half().double().T).log_softmax(-1)
    (p.exp() * (p - q)).sum(-1).mean().backward()
    kl, dtype = DISTILLATION_LOSSES["forward_kl"], torch.float32 if way == "autocast" else torch.float16
    a, b = (tensor.half().to(dtype).requires_grad_() for tensor in (h, w))
    rows = HeadRows(t.half().to(dtype), LMHead(w.half().to(dtype)))
    if way == "full logits":
        loss = divergence_of_logits(a @ b.T, LogitRows(t.half() @ w.half().T), kl, weights=weights).loss
    else:
        with torch.autocast("cpu", dtype=torch.float16, enabled=way == "autocast"):
            loss = fused_divergence(a, LMHead(b), rows, kl, weights=weights).loss
    (loss * scale).backward()
    c, d = (tensor.detach().clone().requires_grad_() for tensor in (a, b))
    with torch.autocast("cpu", dtype=torch.float16, enabled=way == "autocast"):
        logits, teacher_logits = c @ d.T, t.half().to(dtype) @ w.half().to(dtype).T
    (kl(logits[None].float(), teacher_logits[None].float()).mean() * scale).backward()
    for got, plain, want in ((a, c, x), (b, d, y)):
        assert got.grad.dtype == dtype
        error, by_autograd = (
            (one.grad.double() / scale - want.grad).norm() / want.grad.norm() for one in (got, plain)
        )
        assert error < 0.02 and error < 1.1 * by_autograd


def test_a_float16_head_gradient_beyond_the_range_of_float16_is_summed():
    """All tokens pull one row of the head the same way: the sum before division is 100 times the largest float16."""
    tokens = 4096
    hidden, head = torch.full((tokens, 4), 500.0).half(), torch.zeros(6, 4).half().requires_grad_()
    teacher = LogitRows(torch.tensor([[20.0, 0, 0, 0, 0, 0]]).half().expand(tokens, 6))
    weights = torch.full((tokens,), 1 / tokens)
    loss = fused_divergence(hidden, LMHead(head), teacher, DISTILLATION_LOSSES["forward_kl"], weights=weights)
    (gradient,) = torch.autograd.grad(loss.loss, head)
    assert gradient[0, 0].item() == pytest.approx(-500 * 5 / 6, rel=2e-3)


@pytest.mark.parametrize("way", ["fused", "logits"])
def test_without_gradients_none_are_computed(way, monkeypatch):
    from hf_transfer_ext.losses import fused

    hidden, student, teacher_hidden, teacher, labels, weights = problem()
    made = []
    rows, kl = HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES["forward_kl"]
    real = fused._rows
    monkeypatch.setattr(fused, "_rows", lambda *args: (made.append(args[6]), real(*args)))
    monkeypatch.setattr(fused, "_add_outer", lambda *args: made.append("head"))
    with torch.no_grad():
        if way == "fused":
            found = fused_divergence(hidden, student, rows, kl, weights=weights, labels=labels, ce_weight=0.3)
        else:
            logits = student.logits(hidden).requires_grad_()
            found = divergence_of_logits(logits, rows, kl, weights=weights, labels=labels, ce_weight=0.3)
    assert made and all(item is None for item in made)
    loss, kd, ce = by_formula(*problem(), "forward_kl", 1.0, 0.3, 1.0, {})
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.divergence, kd)
    torch.testing.assert_close(found.cross_entropy, ce)


def test_a_second_derivative_is_refused():
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    rows, kl = HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES["forward_kl"]
    loss = fused_divergence(hidden, student, rows, kl, weights=weights).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    logits = student.logits(hidden).detach().requires_grad_()
    loss = divergence_of_logits(logits, rows, kl, weights=weights).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("spread, temperature", [(104.0, 1.0), (150.0, 1.0), (60.0, 0.5), (300.0, 2.0), (3e4, 1.0)])
@pytest.mark.parametrize("name", ["generalized_jsd", "skew_kl", "skew_reverse_kl"])
def test_mixtures_are_finite_on_wide_logits(name, spread, temperature):
    student = torch.linspace(0, -spread, 4000)[None]
    teacher = student + 0.1 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    z, loss = student.clone().requires_grad_(), DISTILLATION_LOSSES[name]
    fused = divergence_of_logits(z, LogitRows(teacher), loss, weights=torch.ones(1), temperature=temperature).loss
    fused.backward()
    exact = student.double().requires_grad_()
    log_q, log_p = (exact / temperature).log_softmax(-1), (teacher.double() / temperature).log_softmax(-1)
    log_m = {
        "generalized_jsd": torch.logaddexp(log_p, log_q) - math.log(2),
        "skew_kl": torch.logaddexp(log_p + math.log(0.1), log_q + math.log(0.9)),
        "skew_reverse_kl": torch.logaddexp(log_p + math.log(0.9), log_q + math.log(0.1)),
    }[name]
    to_p, to_q = (log_p.exp() * (log_p - log_m)).sum(), (log_q.exp() * (log_q - log_m)).sum()
    value = {"generalized_jsd": (to_p + to_q) / 2, "skew_kl": to_p, "skew_reverse_kl": to_q}[name]
    value.backward()
    assert fused.item() == pytest.approx(value.item(), rel=1e-3, abs=1e-7)
    torch.testing.assert_close(z.grad, exact.grad.float(), rtol=1e-3, atol=1e-6)
    own = student.clone()[None].requires_grad_()
    plain = loss(own, teacher[None], temperature=temperature)
    plain.sum().backward()
    assert plain.item() == pytest.approx(value.item(), rel=1e-3, abs=1e-7) and own.grad.isfinite().all()


def test_statistics_describe_the_student_at_temperature_one():
    hidden, student, teacher_hidden, teacher, labels, weights = problem(softcap=5.0, vocab=29)
    closed = student.bias.detach().clone()
    closed[3] = -math.inf
    student = LMHead(student.weight, closed)
    labels[0] = student.logits(hidden)[0].argmax()
    rows, kl = HeadRows(teacher_hidden, teacher), DISTILLATION_LOSSES["reverse_kl"]
    found = fused_divergence(
        hidden, student, rows, kl, weights=weights, labels=labels, temperature=2.0, chunk_tokens=2, statistics=True
    ).statistics
    p = student.logits(hidden).double().softmax(-1)
    torch.testing.assert_close(found.entropy.double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-6)
    assert found.correct.tolist() == (p.argmax(-1) == labels).float().tolist() and found.correct[0] == 1
    with pytest.raises(ValueError, match="needs `labels`"):
        fused_divergence(hidden, student, rows, kl, weights=weights, statistics=True)


def test_hidden_states_and_heads_or_logits_can_be_given_as_they_are():
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    kl = DISTILLATION_LOSSES["forward_kl"]
    rows = fused_divergence(hidden, student, HeadRows(teacher_hidden, teacher), kl, weights=weights)
    plain = fused_linear_divergence(hidden, student, teacher_hidden, teacher, kl, weights=weights)
    logits = divergence_of_logits(student.logits(hidden), teacher.logits(teacher_hidden), kl, weights=weights)
    assert torch.equal(plain.loss, rows.loss)
    torch.testing.assert_close(logits.loss, rows.loss)


@pytest.mark.parametrize("fused", [True, False])
def test_factors_scale_each_tokens_parts_apart(fused):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    teacher, labels = torch.randn(5, 7), torch.randint(0, 7, (5,))
    kd_factors, ce_factors = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0]), torch.tensor([0.0, -1.5, 1.0, 2.0, 0.0])
    weights = torch.rand(5)
    leaf = hidden.float().requires_grad_()
    settings = {"weights": weights, "labels": labels, "kd_weight": 0.7, "ce_weight": 0.3,
                "kd_factors": kd_factors, "ce_factors": ce_factors}  # fmt: skip
    if fused:
        found = fused_divergence(
            leaf,
            LMHead(weight.float(), None),
            LogitRows(teacher),
            DISTILLATION_LOSSES["reverse_kl"],
            chunk_tokens=2,
            **settings,
        )
    else:
        found = divergence_of_logits(leaf @ weight.float().T, teacher, DISTILLATION_LOSSES["reverse_kl"], **settings)
    found.loss.backward()
    exact = hidden.clone().requires_grad_()
    log_q, log_p = (exact @ weight.T).log_softmax(-1), teacher.double().log_softmax(-1)
    kd = (log_q.exp() * (log_q - log_p)).sum(-1)
    ce = -log_q[torch.arange(5), labels]
    loss = (weights * (0.7 * kd_factors * kd + 0.3 * ce_factors * ce)).sum()
    loss.backward()
    torch.testing.assert_close(found.loss.double(), loss.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_temporaries_are_used_again_without_page_faults():
    """In a process of its own, where nothing large was freed before."""
    script = """
import resource, torch
from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import divergence_of_logits
torch.set_num_threads(1)
student, teacher = (torch.randn(64, 150_000, requires_grad=one) for one in (True, False))
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    divergence_of_logits(student, teacher, DISTILLATION_LOSSES["forward_kl"], weights=torch.ones(64))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
page_faults()
print(page_faults(), student.numel() * 4 // resource.getpagesize())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    faults, pages_of_the_gradient = map(int, done.stdout.split())
    assert faults < 1.5 * pages_of_the_gradient
