"""Against loops over matched tokens and the sorted rest."""

import math

import pytest
import torch
from losses.spans_problem import STUDENT, TEACHER, oracle

from hf_transfer_ext.losses.spans import gold, span_pair


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


def test_a_student_that_is_its_teacher_loses_nothing():
    z, ids, groups = STUDENT
    leaf = z.clone().requires_grad_()
    pair = span_pair(leaf, ids, groups, z, ids, groups)
    every = torch.arange(7)
    torch.testing.assert_close(gold(pair, every, every).detach(), torch.zeros(3), atol=1e-6, rtol=0)


def test_the_weight_can_be_the_matched_share_of_the_teachers_vocabulary():
    own, other = torch.tensor([0, 2, 5]), torch.tensor([4, 1, 8])
    pair = span_pair(*STUDENT, *TEACHER)
    share = 3 / pair.teacher.shape[1]
    torch.testing.assert_close(
        gold(pair, own, other, matched_weight=None), gold(pair, own, other, matched_weight=share)
    )


def test_tokens_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="got 1, 2 and"):
        gold(span_pair(*STUDENT, *TEACHER), torch.tensor([0]), torch.tensor([0, 1]))
