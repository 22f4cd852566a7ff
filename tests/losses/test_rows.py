"""A teacher as rows: every form against the definition, and what a divergence may be paired with."""

import math
from itertools import pairwise

import oracles
import pytest
import torch
from losses.test_fused import gradients, problem

from hf_transfer_ext.losses.distillation import DISTILLATION_LOSSES
from hf_transfer_ext.losses.fused import divergence_of_logits, fused_divergence
from hf_transfer_ext.losses.rows import (
    CombinedRows,
    DenseRows,
    HeadRows,
    LogitRows,
    SampledRows,
    SparseRows,
    TopTokens,
)
from hf_transfer_ext.losses.slopes import accepts, forms_of, fused_by

SPARSE = [(name, options) for name, options in oracles.CASES if "sparse" in forms_of(DISTILLATION_LOSSES[name])]
TOP = 5


def buckets(log_probs, ids):
    """Probabilities of the listed tokens and of all the others together, (rows, top + 1)."""
    p = log_probs.exp()
    listed = p.gather(1, ids)
    return torch.cat([listed, (p.sum(1) - listed.sum(1))[:, None]], 1)


def test_all_but_the_ranking_divergence_accept_sparse_rows():
    assert {name for name, _ in SPARSE} == set(DISTILLATION_LOSSES) - {"adaptive_kl"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name, options", SPARSE)
def test_sparse_rows_follow_the_float64_definition_over_buckets(name, options, temperature):
    hidden, student, teacher_hidden, teacher, labels, weights = problem(tokens=2, vocab=9, teacher_vocab=9)
    rows = SparseRows.from_logits(teacher.logits(teacher_hidden), 3, temperature=temperature)
    fused = fused_divergence(
        hidden, student, rows, DISTILLATION_LOSSES[name], weights=weights, labels=labels, kd_weight=0.7,
        ce_weight=0.3, temperature=temperature, chunk_tokens=1, **options,
    )  # fmt: skip
    log_p = (teacher.logits(teacher_hidden).double() / temperature).log_softmax(-1)

    def definition(h):
        z = h.view(2, -1) @ student.weight.detach().double().T + student.bias.detach().double()
        q = buckets((z / temperature).log_softmax(-1), rows.top.ids)
        p = buckets(log_p, rows.top.ids)
        total = 0.0
        for i in range(2):
            kd = oracles.ORACLES[name](q[i].tolist(), p[i].tolist(), **options)
            total += weights[i].item() * (0.7 * kd - 0.3 * math.log(oracles.probabilities(z[i])[labels[i]]))
        return total

    assert fused.loss.item() == pytest.approx(definition(hidden.detach().double()), rel=1e-5)
    (got,) = torch.autograd.grad(fused.loss, hidden)
    want = oracles.slope_of(definition, hidden.detach().reshape(-1)).view_as(hidden)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5)


def by_buckets(z, rows, name, temperature, options):
    """The divergence over buckets by autograd, from full logits."""
    log_q = (z / temperature).log_softmax(-1)
    rest = log_q.scatter(1, rows.top.ids, -math.inf).logsumexp(1, keepdim=True)
    student = torch.cat([log_q.gather(1, rows.top.ids), rest], 1)
    teacher = torch.cat([rows.top.log_probs, rows.top.tail.log()[:, None]], 1)
    return DISTILLATION_LOSSES[name](student[None], teacher[None], **options)[0]


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("name, options", SPARSE)
def test_sparse_rows_equal_autograd_at_every_chunk_size(name, options, chunk_tokens):
    hidden, student, teacher_hidden, teacher, _, weights = problem(scale=0.5, softcap=6.0)
    rows = SparseRows.from_logits(teacher.logits(teacher_hidden), TOP, temperature=1.5)
    fused = fused_divergence(
        hidden, student, rows, DISTILLATION_LOSSES[name], weights=weights, temperature=1.5,
        chunk_tokens=chunk_tokens, **options,
    )  # fmt: skip
    want = by_buckets(student.logits(hidden).float(), rows, name, 1.5, options)
    torch.testing.assert_close(fused.divergence, want.detach(), rtol=1e-4, atol=1e-6)
    total = (weights * want).sum()
    for got, expected in zip(gradients(fused.loss, hidden, student), gradients(total, hidden, student), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name, options", SPARSE)
def test_with_every_token_listed_sparse_rows_are_dense(name, options):
    hidden, student, teacher_hidden, teacher, labels, weights = problem()
    logits = teacher.logits(teacher_hidden)
    found = []
    for rows in (
        SparseRows.from_logits(logits, logits.shape[1]),
        LogitRows(logits),
        HeadRows(teacher_hidden, teacher),
    ):
        fused = fused_divergence(
            hidden, student, rows, DISTILLATION_LOSSES[name], weights=weights, labels=labels, ce_weight=0.5, **options
        )
        found.append((fused.divergence, *gradients(fused.loss, hidden, student)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, options", SPARSE)
def test_merging_tokens_never_raises_the_divergence(name, options):
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    logits, loss = teacher.logits(teacher_hidden), DISTILLATION_LOSSES[name]
    values = [
        fused_divergence(
            hidden, student, SparseRows.from_logits(logits, top), loss, weights=weights, **options
        ).divergence
        for top in (1, 4, 16, logits.shape[1])
    ]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-6).all()


def test_forward_kl_of_one_row_by_hand():
    """Student (1/2, 1/4, 1/4), teacher (3/4, 1/8, 1/8) with its first token listed: buckets (1/2, 1/2), (3/4, 1/4)."""
    z = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    rows = SparseRows(TopTokens(torch.tensor([[0]]), torch.tensor([[0.75]]).log(), torch.tensor([0.25])))
    loss = divergence_of_logits(z, rows, DISTILLATION_LOSSES["forward_kl"], weights=torch.ones(1)).loss
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    (gradient,) = torch.autograd.grad(loss, z)  # q - p for the listed token; the tail is shared by the student's mass
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0.125, 0.125]]))


def test_the_gradient_is_zero_where_the_student_has_the_teachers_buckets():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    for name, options in SPARSE:
        z = logits.clone().requires_grad_()
        loss = divergence_of_logits(
            z, SparseRows.from_logits(logits, 4), DISTILLATION_LOSSES[name], weights=torch.ones(3), **options
        ).loss
        torch.testing.assert_close(loss.detach(), torch.zeros(()), atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.zeros_like(z), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tail", [0.0, 1e-30])
def test_a_tail_of_nothing_and_a_student_of_nothing_outside_the_list(tail):
    """Top-k without a tail is top-k that excludes the rest; a student without mass there has no gradient there."""
    rows = SparseRows(TopTokens(torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.5]]).log(), torch.tensor([tail])))
    z = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf]], requires_grad=True)
    loss = divergence_of_logits(z, rows, DISTILLATION_LOSSES["generalized_jsd"], weights=torch.ones(1)).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[0, [0, 3]] == 0).all()


def test_a_formula_without_a_slope_reads_the_forms_that_it_names():
    @accepts("dense", "sparse")
    def own_kl(student_logits, teacher_logits, *, temperature=1.0):
        log_q, log_p = (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    hidden, student, teacher_hidden, teacher, _, weights = problem()
    logits = teacher.logits(teacher_hidden)
    for rows, temperature in ((SparseRows.from_logits(logits, TOP, temperature=2.0), 2.0), (LogitRows(logits), 1.5)):
        losses = [
            fused_divergence(hidden, student, rows, loss, weights=weights, temperature=temperature)
            for loss in (own_kl, DISTILLATION_LOSSES["forward_kl"])
        ]
        torch.testing.assert_close(losses[0].loss, losses[1].loss)
        for one, two in zip(*(gradients(found.loss, hidden, student) for found in losses), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_mixture_of_two_teachers_is_a_subclass():
    class Mixture(DenseRows):
        def __init__(self, *teachers):
            self.teachers, self.vocab_size = teachers, teachers[0].vocab_size

        def __len__(self):
            return len(self.teachers[0])

        def __call__(self, part):
            return torch.stack([rows(part).log_softmax(-1) for rows in self.teachers]).logsumexp(0)

    hidden, student, teacher_hidden, teacher, _, weights = problem()
    other = teacher_hidden.flip(0)
    kl = DISTILLATION_LOSSES["forward_kl"]
    mixture = Mixture(HeadRows(teacher_hidden, teacher), HeadRows(other, teacher))
    loss = fused_divergence(hidden, student, mixture, kl, weights=weights, chunk_tokens=2).loss
    p = 0.5 * sum(teacher.logits(states).softmax(-1) for states in (teacher_hidden, other))
    want = (weights * kl(student.logits(hidden)[None], p.log()[None])[0]).sum()
    torch.testing.assert_close(loss, want)


def test_pairs_that_cannot_be_are_refused():
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    logits = teacher.logits(teacher_hidden)
    rows = SparseRows.from_logits(logits, TOP, temperature=2.0)
    kl = DISTILLATION_LOSSES["forward_kl"]
    with pytest.raises(ValueError, match="adaptive_kl needs dense teacher rows, but this teacher gives sparse ones"):
        fused_divergence(hidden, student, rows, DISTILLATION_LOSSES["adaptive_kl"], weights=weights)
    with pytest.raises(ValueError, match=r"taken at temperature 2.0, but the loss has `temperature=1.0`"):
        fused_divergence(hidden, student, rows, kl, weights=weights)
    far = SparseRows(TopTokens(rows.top.ids + 100, rows.top.log_probs, rows.top.tail))
    with pytest.raises(ValueError, match="the student has 23 vocabulary entries"):
        fused_divergence(hidden, student, far, kl, weights=weights)
    with pytest.raises(ValueError, match=r"have to sum to 1, got a row of"):
        SparseRows(TopTokens(rows.top.ids, rows.top.log_probs, rows.top.tail.clamp(min=1e-9).log()))
    with pytest.raises(ValueError, match="`top` has to lie between 1 and the 23 vocabulary entries, got 24"):
        SparseRows.from_logits(logits, 24)
    with pytest.raises(ValueError, match="accepts one or more of dense, sparse, sampled, mixture, got"):
        accepts()


@pytest.mark.parametrize("tau", [1.0, 0.7])
@pytest.mark.parametrize("top, samples", [(0, 8), (6, 4)])
@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd", "skew_kl"])
def test_the_mean_gradient_of_many_draws_is_the_full_gradient(name, top, samples, tau):
    """Within 5 standard errors of its own, in every logit; and those errors are small enough to tell a bias."""
    loss, draws = DISTILLATION_LOSSES[name], 4000
    generator = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(1, 30, generator=generator) for _ in range(2))
    leaf = student.clone().requires_grad_()
    dense = divergence_of_logits(leaf, LogitRows(teacher), loss, weights=torch.ones(1), temperature=1.5)
    (full,) = torch.autograd.grad(dense.loss, leaf)
    rows = SampledRows.from_logits(
        teacher.expand(draws, -1), top, samples, temperature=1.5, tau=tau, generator=generator
    )
    many = student.expand(draws, -1).clone().requires_grad_()
    found = divergence_of_logits(many, rows, loss, weights=torch.ones(draws), temperature=1.5)
    (each,) = torch.autograd.grad(found.loss, many)
    for got, want in ((each, full[0]), (found.divergence[:, None], dense.divergence)):
        error = got.std(0) / draws**0.5
        assert ((got.mean(0) - want).abs() <= 5 * error + 1e-6).all()
    assert (each.mean(0) - full[0]).norm() < 0.05 * full.norm()
    # Top-k alone, renormalized, is off by more than that.
    ids = teacher.topk(max(top, 3)).indices
    biased = torch.zeros_like(teacher).scatter(1, ids, (teacher.gather(1, ids) / 1.5).softmax(-1))
    if name == "forward_kl":
        wrong = ((student / 1.5).softmax(-1) - biased) / 1.5
        assert (wrong - full).norm() > 0.05 * full.norm()


def test_sampled_rows_of_a_whole_vocabulary_or_without_a_tail_are_dense():
    hidden, student, teacher_hidden, teacher, labels, weights = problem()
    logits = teacher.logits(teacher_hidden)
    kl = DISTILLATION_LOSSES["reverse_kl"]
    found = []
    for rows in (LogitRows(logits), SampledRows.from_logits(logits, logits.shape[1], 3)):
        fused = fused_divergence(
            hidden, student, rows, kl, weights=weights, labels=labels, ce_weight=0.5, chunk_tokens=2
        )
        found.append((fused.divergence, *gradients(fused.loss, hidden, student)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_sampled_is_refused():
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    logits = teacher.logits(teacher_hidden)
    rows = SampledRows.from_logits(logits, 2, 3)
    with pytest.raises(ValueError, match="adaptive_kl needs dense teacher rows, but this teacher gives sampled ones"):
        fused_divergence(hidden, student, rows, DISTILLATION_LOSSES["adaptive_kl"], weights=weights)
    with pytest.raises(ValueError, match=r"sampled rows were taken at temperature 1.0, but the loss has"):
        fused_divergence(hidden, student, rows, DISTILLATION_LOSSES["forward_kl"], weights=weights, temperature=2.0)
    with pytest.raises(ValueError, match="`top` has to lie between 0 and the 23 vocabulary entries, got 24"):
        SampledRows.from_logits(logits, 24, 3)
    for bad in ({"samples": 0}, {"samples": 1, "temperature": 0.0}, {"samples": 1, "tau": 0.0}):
        with pytest.raises(ValueError, match="`samples` has to be >= 1, `temperature` and `tau` > 0"):
            SampledRows.from_logits(logits, 2, **bad)
    with pytest.raises(ValueError, match="accepts sampled rows, which needs its slope"):
        accepts("sampled")(lambda student_logits, teacher_logits, *, temperature=1.0: None)
    assert forms_of(fused_by(lambda student, teacher: None, forms=("sampled",))(lambda a, b: None)) == ("sampled",)


# ---- Several teachers ----

SUMS = [(name, options) for name, options in oracles.CASES if "sampled" in forms_of(DISTILLATION_LOSSES[name])]


def three_forms(logits, temperature=1.0):
    """A dense, a sparse and a sampled teacher of three, two and four of nine tokens."""
    places = [torch.tensor([0, 4, 8]), torch.tensor([2, 3]), torch.tensor([1, 5, 6, 7])]
    seed = torch.Generator().manual_seed(3)
    members = [
        LogitRows(logits[places[0]]),
        SparseRows.from_logits(logits[places[1]], 4, temperature=temperature),
        SampledRows.from_logits(logits[places[2]], 3, 5, temperature=temperature, generator=seed),
    ]
    return members, places


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 100])
@pytest.mark.parametrize("name, options", SUMS)
def test_routed_rows_are_the_separate_losses_summed(name, options, chunk_tokens):
    hidden, student, teacher_hidden, teacher, labels, weights = problem()
    members, places = three_forms(teacher.logits(teacher_hidden), 1.5)
    shared = {"kd_weight": 0.7, "ce_weight": 0.3, "temperature": 1.5, **options}
    got = fused_divergence(
        hidden, student, CombinedRows.routed(members, places), DISTILLATION_LOSSES[name], weights=weights,
        labels=labels, chunk_tokens=chunk_tokens, statistics=True, **shared,
    )  # fmt: skip
    total, values = 0.0, torch.zeros(len(hidden))
    for member, own in zip(members, places, strict=True):
        alone = fused_divergence(
            hidden[own], student, member, DISTILLATION_LOSSES[name], weights=weights[own], labels=labels[own], **shared
        )
        total, values[own] = total + alone.loss, alone.divergence
    torch.testing.assert_close(got.divergence, values)
    torch.testing.assert_close(got.loss, total)
    for one, two in zip(gradients(got.loss, hidden, student), gradients(total, hidden, student), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_routed_rows_of_logits_and_an_option_of_each_token():
    """An option that is a tensor follows its tokens to their teachers."""
    generator = torch.Generator().manual_seed(1)
    z, t = (2 * torch.randn(9, 11, generator=generator) for _ in range(2))
    weights, power = torch.rand(9, generator=generator), torch.linspace(0.5, 2.5, 9)

    def slope(student, teacher, power=1.0):
        return (power * teacher.probs * (teacher.log - student.log)).sum(-1), -power * teacher.probs

    @fused_by(slope, forms=("dense", "sparse", "sampled"))
    def scaled_kl(student_logits, teacher_logits, *, temperature=1.0, power=1.0):
        raise NotImplementedError("its slope is called instead")

    members, places = three_forms(t)
    leaf = z.clone().requires_grad_()
    got = divergence_of_logits(leaf, CombinedRows.routed(members, places), scaled_kl, weights=weights, power=power)
    got.loss.backward()
    for member, own in zip(members, places, strict=True):
        few = z[own].clone().requires_grad_()
        alone = divergence_of_logits(few, member, scaled_kl, weights=weights[own], power=power[own])
        alone.loss.backward()
        torch.testing.assert_close(got.divergence[own], alone.divergence)
        torch.testing.assert_close(leaf.grad[own], few.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixed_rows_follow_the_float64_definition_and_have_the_gradient_of_the_mixture(temperature):
    """Whole lists, of both kinds, and a dense teacher: the value by loops, the gradient of the mixture by autograd."""
    generator = torch.Generator().manual_seed(2)
    z, *teachers = (2 * torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(4))
    shares = torch.rand(4, 3, generator=generator, dtype=torch.float64).softmax(1)
    weights = torch.rand(4, generator=generator, dtype=torch.float64)
    rows = CombinedRows.mixed(
        [
            LogitRows(teachers[0].float()),
            SparseRows.from_logits(teachers[1].float(), 6, temperature=temperature),
            SampledRows.from_logits(teachers[2].float(), 6, 2, temperature=temperature),
        ],
        shares.float(),
    )
    leaf = z.float().requires_grad_()
    forward_kl = DISTILLATION_LOSSES["forward_kl"]
    got = divergence_of_logits(leaf, rows, forward_kl, weights=weights.float(), temperature=temperature)
    got.loss.backward()

    p = [(one / temperature).softmax(-1) for one in teachers]
    for t in range(4):
        q = oracles.probabilities(z[t] / temperature)
        expected = 0.0
        for i in range(3):
            expected += shares[t, i].item() * sum(
                p[i][t, v].item() * math.log(p[i][t, v].item() / q[v]) for v in range(6)
            )
        assert got.divergence[t].item() == pytest.approx(expected, rel=1e-5)

    own = z.clone().requires_grad_()
    mixture = sum(shares[:, i, None] * p[i] for i in range(3))
    kl = (mixture * (mixture.log() - (own / temperature).log_softmax(-1))).sum(-1)
    (weights * kl).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), own.grad, rtol=1e-4, atol=1e-6)
    # What the value is larger by does not depend on the student.
    beyond = sum(shares[:, i] * (p[i] * (p[i] / mixture).log()).sum(-1) for i in range(3))
    torch.testing.assert_close(got.divergence.double(), kl.detach() + beyond, rtol=1e-4, atol=1e-6)


def test_a_tail_in_a_mixture_follows_the_students_own():
    """The gradient of a short list in a mixture is that of a teacher whose tail has the shape of the student's."""
    generator = torch.Generator().manual_seed(4)
    z, one, two = (2 * torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    shares = torch.tensor([0.3, 0.7]).expand(5, 2)
    short = SparseRows.from_logits(two.float(), 3)
    leaf = z.float().requires_grad_()
    divergence_of_logits(
        leaf, CombinedRows.mixed([LogitRows(one.float()), short], shares), DISTILLATION_LOSSES["forward_kl"],
        weights=torch.ones(5),
    ).loss.backward()  # fmt: skip
    q = z.softmax(-1)
    rest = torch.ones_like(q).scatter(1, short.top.ids, 0.0) * q
    filled = short.top.tail.double()[:, None] * rest / rest.sum(1, keepdim=True)
    filled = filled.scatter(1, short.top.ids, short.top.log_probs.double().exp())
    own = z.clone().requires_grad_()
    mixture = 0.3 * one.softmax(-1) + 0.7 * filled
    (-(mixture * own.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), own.grad, rtol=1e-4, atol=1e-6)


def test_several_teachers_that_do_not_fit_the_divergence_or_each_other_are_refused():
    hidden, student, teacher_hidden, teacher, _, weights = problem()
    members, places = three_forms(teacher.logits(teacher_hidden))
    routed, losses = CombinedRows.routed(members, places), DISTILLATION_LOSSES
    with pytest.raises(ValueError, match="adaptive_kl needs dense teacher rows, but this teacher gives sparse ones"):
        fused_divergence(hidden, student, routed, losses["adaptive_kl"], weights=weights)
    with pytest.raises(ValueError, match=r"taken at temperature 1\.0, but the loss has `temperature=2\.0`"):
        fused_divergence(hidden, student, routed, losses["forward_kl"], weights=weights, temperature=2.0)
    whole = [LogitRows(teacher.logits(teacher_hidden)), SparseRows.from_logits(teacher.logits(teacher_hidden), 4)]
    mixed = CombinedRows.mixed(whole, torch.full((len(hidden), 2), 0.5))
    with pytest.raises(ValueError, match=r"reverse_kl needs the probability of each token in the mixture .* forward_"):
        fused_divergence(hidden, student, mixed, losses["reverse_kl"], weights=weights)
    with pytest.raises(ValueError, match="have to be >= 0 and sum to 1"):
        CombinedRows.mixed(whole, torch.full((len(hidden), 2), 0.6))
    with pytest.raises(ValueError, match="Each of 9 tokens needs one teacher"):
        CombinedRows.routed(members, [places[0], places[1], torch.tensor([1, 5, 6, 6])])
    with pytest.raises(ValueError, match="one place and one weight for each of its rows"):
        CombinedRows.routed(members, [places[1], places[0], places[2]])
