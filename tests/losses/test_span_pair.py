"""Spans of two tokenizations: the chain rule, adversarial texts, and what is refused."""

import pytest
import torch
from losses.spans_problem import STUDENT, TEACHER, logits, oracle
from tiny_tokenizers import byte_fallback, byte_level

from hf_transfer_ext.losses.spans import alm, gold, span_pair, uld
from hf_transfer_ext.teachers.alignment import TokenBytes, align, align_vocabularies


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


def test_what_cannot_be_is_refused():
    z, ids, groups = STUDENT
    with pytest.raises(ValueError, match="got 3 groups of the student, 2 of the teacher"):
        span_pair(z, ids, groups, TEACHER[0], TEACHER[1], TEACHER[2][:2])
    with pytest.raises(ValueError, match="tokens 5 to 7 does not lie within the 6 tokens"):
        span_pair(z, ids, [(1, 2), (2, 5), (5, 7)], *TEACHER)
