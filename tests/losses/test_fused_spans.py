"""The chunked core of span losses: equal to the plain formula on full logits, in value and gradient, however split."""

import pytest
import torch
from losses.spans_problem import STUDENT, TEACHER

from hf_transfer_ext.losses import fused_spans as module
from hf_transfer_ext.losses.fused_spans import SpanTokens, fused_spans
from hf_transfer_ext.losses.rows import HeadRows, LogitRows
from hf_transfer_ext.losses.spans import SPAN_LOSSES, has_projections, span_pair, takes_vocabularies
from hf_transfer_ext.models.heads import LMHead, LogitFinish

PAIR_LOSSES = [name for name, loss in SPAN_LOSSES.items() if not has_projections(loss)]
MATCHED = {"student_ids": torch.tensor([0, 2, 5]), "teacher_ids": torch.tensor([4, 1, 8])}


def flat(side):
    _, ids, groups = side
    rows = [row for first, end in groups for row in range(first - 1, end - 1)]
    sizes = torch.tensor([end - first for first, end in groups])
    return torch.tensor(rows), SpanTokens(ids[torch.tensor(rows) + 1], sizes)


def problem(name):
    loss = SPAN_LOSSES[name]
    return loss, MATCHED if takes_vocabularies(loss) else {}


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_logits_in_chunks_are_the_plain_formula(name, chunk):
    loss, options = problem(name)
    weights = torch.tensor([0.3, 1.0, 0.5])
    plain = STUDENT[0].clone().requires_grad_()
    wanted = loss(span_pair(plain, *STUDENT[1:], *TEACHER, temperature=2.0), **options)
    (wanted * weights).sum().backward()
    leaf = STUDENT[0].clone().requires_grad_()
    (rows, own), (other_rows, other) = flat(STUDENT), flat(TEACHER)
    found = fused_spans(
        leaf[rows], None, own, LogitRows(TEACHER[0][other_rows]), other, loss, weights=weights, temperature=2.0,
        chunk_rows=chunk, **options,
    )  # fmt: skip
    (2 * found.loss).backward()
    torch.testing.assert_close(found.values, wanted.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loss.item(), (wanted * weights).sum().item(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(leaf.grad, 2 * plain.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_head_gets_its_gradients(name):
    loss, options = problem(name)
    generator = torch.Generator().manual_seed(0)
    (rows, own), (other_rows, other) = flat(STUDENT), flat(TEACHER)
    finish, weights = LogitFinish(scale=2.0, softcap=5.0), torch.tensor([0.3, 1.0, 0.5])
    start = [torch.randn(*shape, generator=generator) for shape in ((6, 4), (7, 4), (7,))]
    teacher_hidden, teacher_head = (
        torch.randn(5, 3, generator=generator),
        LMHead(torch.randn(9, 3, generator=generator)),
    )
    plain, leaves = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    logits = LMHead(plain[1], plain[2], finish).logits(plain[0])
    pair = span_pair(logits, *STUDENT[1:], teacher_head.logits(teacher_hidden), *TEACHER[1:])
    (loss(pair, **options) * weights).sum().backward()
    found = fused_spans(
        leaves[0][rows], LMHead(leaves[1], leaves[2], finish), own, HeadRows(teacher_hidden[other_rows], teacher_head),
        other, loss, weights=weights, chunk_rows=2, **options,
    )  # fmt: skip
    found.loss.backward()
    for one, two in zip(leaves, plain, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


def test_no_more_rows_than_a_chunk_exist_at_once(monkeypatch):
    seen = []
    original = module.merged_predictions
    monkeypatch.setattr(module, "merged_predictions", lambda z, *a, **k: seen.append(len(z)) or original(z, *a, **k))
    (rows, own), (other_rows, other) = flat(STUDENT), flat(TEACHER)
    fused_spans(
        STUDENT[0][rows], None, own, LogitRows(TEACHER[0][other_rows]), other, SPAN_LOSSES["uld"],
        weights=torch.ones(3), chunk_rows=3,
    )  # fmt: skip
    assert max(seen) == 3 and sum(seen) == len(rows) + len(other_rows)


def test_no_span_is_a_loss_of_zero_with_a_gradient():
    leaf, none = torch.zeros(0, 7).requires_grad_(), SpanTokens(torch.zeros(0).long(), torch.zeros(0).long())
    found = fused_spans(
        leaf, None, none, LogitRows(torch.zeros(0, 9)), none, SPAN_LOSSES["uld"], weights=torch.ones(0)
    )
    found.loss.backward()
    assert found.loss.item() == 0 and leaf.grad.shape == (0, 7)


def test_different_spans_are_refused():
    (rows, own), (other_rows, other) = flat(STUDENT), flat(TEACHER)
    with pytest.raises(ValueError, match="got 2 and 4 teacher rows"):
        teacher = LogitRows(TEACHER[0][other_rows[:2]])
        fused_spans(STUDENT[0][rows], None, own, teacher, other, SPAN_LOSSES["uld"], weights=torch.ones(3))
