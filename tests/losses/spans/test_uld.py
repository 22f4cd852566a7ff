"""Against sorted probabilities, token by token."""

import pytest
import torch
from losses.spans_problem import STUDENT, TEACHER, oracle

from hf_transfer_ext.losses.spans import span_pair, uld


def test_uld_is_the_distance_of_sorted_probabilities():
    found = uld(span_pair(*STUDENT, *TEACHER))
    for i, (q, p) in enumerate(zip(oracle(STUDENT)[0], oracle(TEACHER)[0], strict=True)):
        q, p = [*sorted(q, reverse=True), 0.0, 0.0], sorted(p, reverse=True)
        assert found[i].item() == pytest.approx(sum(abs(a - b) for a, b in zip(q, p, strict=True)), rel=1e-4)


def test_a_student_that_is_its_teacher_loses_nothing():
    z, ids, groups = STUDENT
    leaf = z.clone().requires_grad_()
    pair = span_pair(leaf, ids, groups, z, ids, groups)
    torch.testing.assert_close(uld(pair).detach(), torch.zeros(3), atol=1e-6, rtol=0)
