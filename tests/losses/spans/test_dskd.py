"""Against loops in float64; the start of the projections; which texts and tokens are compared."""

import math

import pytest
import torch

from hf_transfer_ext.losses.spans import dskd
from hf_transfer_ext.losses.spans.dskd import SpaceSide, start_of_projection
from hf_transfer_ext.models.heads import LMHead

TEXTS = torch.tensor([0, 0, 0, 1, 1])
MATCHED = (torch.tensor([0, 1, 2, 3]), torch.tensor([1, 4, 3, 2]))


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def sides():
    """Two texts of three and two spans; the second span has two tokens for the student, the fourth two for both."""
    own, other = torch.tensor([1, 2, 1, 2, 1]), torch.tensor([1, 1, 1, 2, 1])
    student = SpaceSide(random(7, 3, seed=1), LMHead(random(6, 3, seed=2)), random(7, 3, seed=3), random(7, 3, seed=4),
                        torch.tensor([0, 1, 2, 3, 4, 5, 0]), own)  # fmt: skip
    teacher = SpaceSide(random(6, 4, seed=5), LMHead(random(8, 4, seed=6)), random(6, 4, seed=7), random(6, 4, seed=8),
                        torch.tensor([7, 6, 5, 4, 3, 2]), other)  # fmt: skip
    return student, teacher


def projections(query=True):
    found = {"to_student": random(3, 4, seed=9), "to_teacher": random(4, 3, seed=10)}
    if query:
        found["query"] = random(8, 6, seed=11)
    return {name: value.requires_grad_() for name, value in found.items()}


def probabilities(state, head, temperature=1.0):
    scores = [sum(a * b for a, b in zip(state, row, strict=True)) / temperature for row in head]
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def deviation(rows):
    values = [value for row in rows for value in row]
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5


def by_loops(student, teacher, p, temperature):
    """Each row's part of the loss with cross-model attention; texts have 4 and 3, and 3 and 3 rows."""
    own, other = (
        {n: getattr(s, n).tolist() for n in ("states", "read", "written", "targets")} for s in (student, teacher)
    )
    w_s, w_t = student.head.weight.tolist(), teacher.head.weight.tolist()
    p = {name: value.tolist() for name, value in p.items()}
    values, back, agreed = [], [], 0
    for rows, others in ((range(4), range(3)), (range(4, 7), range(3, 6))):
        index = {j: other["read"][j] + other["written"][j] for j in others}
        scale = deviation(index.values())
        h_scale, e_scale = (deviation([other[n][j] for j in others]) for n in ("states", "written"))
        mixed = {j: [h / h_scale + e / e_scale for h, e in zip(other["states"][j], other["written"][j], strict=True)]
                 for j in others}  # fmt: skip
        asked = {i: times(p["query"], own["read"][i] + own["written"][i]) for i in rows}
        score = {
            (i, j): sum(a * b / scale for a, b in zip(asked[i], index[j], strict=True)) / len(index[j]) ** 0.5
            for i in rows for j in others
        }  # fmt: skip
        for i in rows:
            total = sum(math.exp(score[i, j]) for j in others)
            state = [sum(math.exp(score[i, j]) / total * times(p["to_student"], mixed[j])[d] for j in others)
                     for d in range(3)]  # fmt: skip
            told = probabilities(state, w_s)
            y = own["targets"][i]
            value = -math.log(told[y])
            if max(range(6), key=told.__getitem__) == y:
                agreed += 1
                value += kl(probabilities(state, w_s, temperature), probabilities(own["states"][i], w_s, temperature))
            values.append(value)
        for j in others:
            total = sum(math.exp(score[i, j]) for i in rows)
            state = [sum(math.exp(score[i, j]) / total * times(p["to_teacher"], own["states"][i])[d] for i in rows)
                     for d in range(4)]  # fmt: skip
            back.append(
                kl(probabilities(other["states"][j], w_t, temperature), probabilities(state, w_t, temperature))
            )
    assert 0 < agreed < len(values)
    return values + back


def test_attention_follows_its_definition():
    (student, teacher), p = sides(), projections()
    found = dskd(student, teacher, TEXTS, *MATCHED, p, 0.5, 2.0)
    wanted = by_loops(student, teacher, p, 2.0)
    assert found.values.tolist() == pytest.approx(wanted, rel=1e-4)
    assert found.loss.item() == pytest.approx(0.5 * sum(wanted), rel=1e-4)


def exact_formula(student, teacher, p, divergence):
    """The same in plain tensors, for gradients: spans 0, 2 and 4 are one token on both sides."""
    rows, others = torch.tensor([0, 3, 6]), torch.tensor([0, 2, 5])
    t = teacher.states[others] @ teacher.head.weight.T
    spelled = {theirs: ours for ours, theirs in zip(*(one.tolist() for one in MATCHED), strict=True)}
    labels = [spelled.get(i) for i in t.argmax(-1).tolist()]
    there = torch.tensor([label is not None for label in labels])
    assert there.tolist() == [True, True, False]
    labels = torch.tensor([label for label in labels if label is not None])
    frozen = student.head.weight.detach()
    told = teacher.states[others][there] @ p["to_student"].T @ frozen.T
    ce = torch.nn.functional.cross_entropy(told, labels, reduction="none")
    own = student.states[rows][there]
    agrees = told.argmax(-1) == labels
    assert agrees.tolist() == [True, False]
    q, r = (own @ student.head.weight.T).log_softmax(-1), told.detach().log_softmax(-1)
    back = (own @ p["to_teacher"].T @ teacher.head.weight.T).log_softmax(-1)
    return (ce + agrees * divergence(q, r)).sum() + divergence(back, t[there].log_softmax(-1)).sum()


def reverse(q, p):
    return (q.exp() * (q - p)).sum(-1)


def test_exact_spans_follow_their_definition_in_value_and_gradient():
    (student, teacher), p = sides(), projections(query=False)
    leaves = [student.states.requires_grad_(), student.head.weight.requires_grad_(), *p.values()]
    wanted = exact_formula(student, teacher, p, reverse)
    gradients = torch.autograd.grad(wanted, leaves)
    options = {"alignment": "exact", "divergence": "reverse_kl"}
    found = dskd(student, teacher, TEXTS, *MATCHED, p, **options)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-4, atol=1e-6)
    for one, two in zip(torch.autograd.grad(found.loss, leaves), gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_gradients_of_attention_are_those_of_the_formula_and_texts_do_not_mix():
    (student, teacher), p = sides(), projections()
    states = student.states.requires_grad_()
    whole = dskd(student, teacher, TEXTS, *MATCHED, p)
    parts = []
    for rows, others, spans in ((slice(4), slice(3), slice(3)), (slice(4, 7), slice(3, 6), slice(3, 5))):
        own, other = (
            SpaceSide(s.states[r], s.head, s.read[r], s.written[r], s.targets[r], s.sizes[spans])
            for s, r in ((student, rows), (teacher, others))
        )
        parts.append(dskd(own, other, TEXTS[spans], *MATCHED, p).loss)
    torch.testing.assert_close(whole.loss, sum(parts))
    (gradient,) = torch.autograd.grad(whole.loss, states, retain_graph=False)
    step = 1e-2
    for i, d in ((0, 0), (5, 2)):
        with torch.no_grad():
            states[i, d] += step
            more = dskd(student, teacher, TEXTS, *MATCHED, p).loss
            states[i, d] -= 2 * step
            less = dskd(student, teacher, TEXTS, *MATCHED, p).loss
            states[i, d] += step
        assert ((more - less) / (2 * step)).item() == pytest.approx(gradient[i, d].item(), rel=2e-2, abs=1e-3)


def test_a_projection_starts_where_matched_tokens_have_the_logits_that_they_had():
    student, teacher = random(6, 3, seed=2), random(8, 4, seed=6)
    teacher[MATCHED[1]] = student[MATCHED[0]] @ random(3, 4, seed=1)  # a student that can say all that it says
    start = start_of_projection(teacher, student, MATCHED[1], MATCHED[0])
    torch.testing.assert_close(student[MATCHED[0]] @ start, teacher[MATCHED[1]], rtol=1e-3, atol=1e-4)


def test_no_span_gives_zero_with_a_gradient_and_a_bad_option_is_named():
    student, teacher = sides()
    none = torch.zeros(0, dtype=torch.long)
    empty = [SpaceSide(s.states[:0].requires_grad_(), s.head, s.read[:0], s.written[:0], none, none)
             for s in (student, teacher)]  # fmt: skip
    for alignment in ("attention", "exact"):
        p = projections()
        found = dskd(*empty, none, *MATCHED, p, alignment=alignment)
        found.loss.backward()
        assert found.loss.item() == 0 and len(found.values) == 0 and p["to_student"].grad.abs().sum() == 0
    with pytest.raises(ValueError, match=r"Unknown alignment of dskd 'exakt'\. Did you mean 'exact'"):
        dskd(student, teacher, TEXTS, *MATCHED, projections(), alignment="exakt")
