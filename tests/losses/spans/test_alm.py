"""Against binary cross entropies of span likelihoods."""

import math

import pytest
import torch
from losses.spans_problem import STUDENT, TEACHER, oracle

from hf_transfer_ext.losses.spans import alm, span_pair


def test_alm_is_a_binary_cross_entropy():
    found = alm(span_pair(*STUDENT, *TEACHER), tau=10.0)
    for i, (s, t) in enumerate(zip(oracle(STUDENT)[1], oracle(TEACHER)[1], strict=True)):
        a, b = math.exp(t / 10 - 1e-6), math.exp(s / 10 - 1e-6)
        assert found[i].item() == pytest.approx(-a * math.log(b) - (1 - a) * math.log(1 - b), rel=1e-3)


def test_a_student_that_is_its_teacher_is_at_the_minimum():
    z, ids, groups = STUDENT
    leaf = z.clone().requires_grad_()
    pair = span_pair(leaf, ids, groups, z, ids, groups)
    (gradient,) = torch.autograd.grad(alm(pair).sum(), leaf)
    torch.testing.assert_close(gradient, torch.zeros_like(z), atol=1e-5, rtol=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`tau` and `epsilon` of alm have to be > 0"):
        alm(span_pair(*STUDENT, *TEACHER), tau=0.0)
