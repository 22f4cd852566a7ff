"""Losses across tokenizers against float64 loops, on texts that are split differently, and with a BOS on one side."""

import math

import pytest
import torch
from tiny_tokenizers import byte_fallback, byte_level

from hf_transfer_ext.losses.spans import SPAN_LOSSES, SpanPair, alm, gold, span_pair, uld
from hf_transfer_ext.teachers.alignment import TokenBytes, align, align_vocabularies


def logits(length, vocab, seed):
    return 2 * torch.randn(length, vocab, generator=torch.Generator().manual_seed(seed))


def log_softmax(row, temperature=1.0):
    values = [x / temperature for x in row.tolist()]
    total = math.log(sum(math.exp(v) for v in values))
    return [v - total for v in values]


STUDENT = logits(6, 7, 0), torch.tensor([1, 4, 0, 6, 2, 5]), [(1, 2), (2, 5), (5, 6)]
TEACHER = logits(5, 9, 1), torch.tensor([3, 8, 2, 7, 0]), [(1, 3), (3, 4), (4, 5)]


def oracle(side, temperature=1.0):
    """Merged distributions and span likelihoods by the chain rule, token by token."""
    z, ids, groups = side
    merged, spans = [], []
    for first, end in groups:
        before = sum(log_softmax(z[i - 1], temperature)[ids[i]] for i in range(first, end - 1))
        last = log_softmax(z[end - 2], temperature)
        merged.append([math.exp(before + value) for value in last])
        spans.append(before + last[ids[end - 1]])
    return merged, spans


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_pair_follows_the_chain_rule(temperature):
    pair = span_pair(*STUDENT, *TEACHER, temperature=temperature)
    for got, spans, side in ((pair.student, pair.student_spans, STUDENT), (pair.teacher, pair.teacher_spans, TEACHER)):
        merged, likelihoods = oracle(side, temperature)
        torch.testing.assert_close(got.exp(), torch.tensor(merged), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(spans, torch.tensor(likelihoods), rtol=1e-4, atol=1e-5)


def test_a_span_that_starts_a_side_is_left_out():
    z, ids, groups = TEACHER
    pair = span_pair(*STUDENT, z, ids, [(0, 3), *groups[1:]])
    assert len(pair.student) == len(pair.teacher_spans) == 2
    torch.testing.assert_close(pair.student, span_pair(*STUDENT, *TEACHER).student[1:])


def test_uld_is_the_distance_of_sorted_probabilities():
    found = uld(span_pair(*STUDENT, *TEACHER))
    for i, (q, p) in enumerate(zip(oracle(STUDENT)[0], oracle(TEACHER)[0], strict=True)):
        q, p = [*sorted(q, reverse=True), 0.0, 0.0], sorted(p, reverse=True)
        assert found[i].item() == pytest.approx(sum(abs(a - b) for a, b in zip(q, p, strict=True)), rel=1e-4)


def test_gold_is_jsd_on_matched_tokens_and_uld_on_the_rest():
    own, other = torch.tensor([0, 2, 5]), torch.tensor([4, 1, 8])
    found = gold(span_pair(*STUDENT, *TEACHER), own, other, matched_weight=0.3)
    for i, (q, p) in enumerate(zip(oracle(STUDENT)[0], oracle(TEACHER)[0], strict=True)):
        qs, ps = [q[j] for j in own], [p[j] for j in other]
        qs, ps = [*qs, 1 - sum(qs)], [*ps, 1 - sum(ps)]
        pairs = list(zip(qs, ps, strict=True))
        jsd = sum(0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b)) for a, b in pairs)
        rest_q = sorted((v for j, v in enumerate(q) if j not in own.tolist()), reverse=True)
        rest_p = sorted((v for j, v in enumerate(p) if j not in other.tolist()), reverse=True)
        rest_q += [0.0] * (len(rest_p) - len(rest_q))
        rest = sum(abs(a - b) for a, b in zip(rest_q, rest_p, strict=True))
        assert found[i].item() == pytest.approx(0.3 * jsd + 0.7 * rest, rel=1e-3)


def test_alm_is_a_binary_cross_entropy():
    found = alm(span_pair(*STUDENT, *TEACHER), tau=10.0)
    for i, (s, t) in enumerate(zip(oracle(STUDENT)[1], oracle(TEACHER)[1], strict=True)):
        a, b = math.exp(t / 10 - 1e-6), math.exp(s / 10 - 1e-6)
        assert found[i].item() == pytest.approx(-a * math.log(b) - (1 - a) * math.log(1 - b), rel=1e-3)


def losses(pair, matched):
    return {"uld": uld(pair), "gold": gold(pair, *matched), "alm": alm(pair)}


@pytest.mark.parametrize("text", ["The capital of France", "東京 🙂🙃", "a    b\n\n\tc", "naïve café"])
@pytest.mark.parametrize("bos", [True, False])
def test_two_tokenizers_with_adversarial_texts_give_finite_losses_and_gradients(text, bos):
    own, other = byte_level(), byte_fallback()
    ids, ids2 = own(text, add_special_tokens=bos)["input_ids"], other(text)["input_ids"]
    found = align(ids, ids2, TokenBytes(own), TokenBytes(other))
    z = logits(len(ids), len(own), 0).requires_grad_()
    pair = span_pair(
        z, torch.tensor(ids), found.student, logits(len(ids2), len(other), 1), torch.tensor(ids2), found.teacher
    )
    assert len(pair.student) == len(found.student) - (not bos)  # without a BOS nothing predicts the first span
    table = align_vocabularies(own, other)
    for name, values in losses(pair, (table.student_ids, table.teacher_ids)).items():
        (gradient,) = torch.autograd.grad(values.sum(), z, retain_graph=True)
        assert values.isfinite().all() and gradient.isfinite().all(), name
        assert not len(values) or gradient.abs().sum() > 0, name


def test_a_student_that_is_its_teacher_loses_nothing_and_alm_is_at_its_minimum():
    z, ids, groups = STUDENT
    leaf = z.clone().requires_grad_()
    pair = span_pair(leaf, ids, groups, z, ids, groups)
    every = torch.arange(7)
    torch.testing.assert_close(uld(pair).detach(), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(gold(pair, every, every).detach(), torch.zeros(3), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(alm(pair).sum(), leaf)
    torch.testing.assert_close(gradient, torch.zeros_like(z), atol=1e-5, rtol=0)


def test_what_cannot_be_is_refused():
    z, ids, groups = STUDENT
    with pytest.raises(ValueError, match="got 3 groups of the student, 2 of the teacher"):
        span_pair(z, ids, groups, TEACHER[0], TEACHER[1], TEACHER[2][:2])
    with pytest.raises(ValueError, match="tokens 5 to 7 does not lie within the 6 tokens"):
        span_pair(z, ids, [(1, 2), (2, 5), (5, 7)], *TEACHER)
    pair = span_pair(*STUDENT, *TEACHER)
    with pytest.raises(ValueError, match="got 1, 2 and"):
        gold(pair, torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`tau` and `epsilon` of alm have to be > 0"):
        alm(pair, tau=0.0)
    assert isinstance(pair, SpanPair) and list(SPAN_LOSSES) == ["uld", "gold", "alm"]
