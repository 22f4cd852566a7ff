"""Losses inside the network against float64 loops; layer maps by hand."""

import math

import pytest
import torch

from hf_transfer_ext.losses.hidden import (
    HIDDEN_LOSSES,
    attention_mse,
    attention_relation,
    hidden_cosine,
    hidden_mse,
    layer_pairs,
)

MASK = torch.tensor([[True, True, True], [True, True, False]])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "mapping, pairs",
    [
        ("uniform", [(0, 3), (1, 7), (2, 11)]),
        ("last", [(0, 9), (1, 10), (2, 11)]),
        ("skip", [(0, 0), (1, 4), (2, 8)]),
        ([(0, 5), (-1, -1)], [(0, 5), (2, 11)]),
    ],
)
def test_layer_maps_by_hand(mapping, pairs):
    assert layer_pairs(mapping, 3, 12) == pairs


def test_uneven_depths_still_end_at_the_last_layer():
    assert layer_pairs("uniform", 3, 7) == [(0, 1), (1, 3), (2, 6)] and layer_pairs("uniform", 4, 4)[-1] == (3, 3)


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"The pair \(0, 12\) names layer 12 of the teacher, which has 12 layers"):
        layer_pairs([(0, 12)], 3, 12)
    with pytest.raises(ValueError, match="names layer 3 of the student, which has 3 layers"):
        layer_pairs([(3, 1)], 3, 12)
    with pytest.raises(ValueError, match="different layers of the student"):
        layer_pairs([(0, 1), (-3, 2)], 3, 12)
    with pytest.raises(ValueError, match=r"Unknown layer map 'unifrom'. Did you mean 'uniform'"):
        layer_pairs("unifrom", 3, 12)
    with pytest.raises(ValueError, match="at least as deep as the student, got 3 and 12 layers"):
        layer_pairs("last", 12, 3)


def test_hidden_states_follow_their_definitions():
    student, teacher, projection = random(2, 3), random(2, 4, seed=1), random(4, 3, seed=2)
    mse, cosine = hidden_mse(student, teacher, projection), hidden_cosine(student, teacher, projection)
    for i in range(2):
        moved = [sum(projection[j, k].item() * student[i, k].item() for k in range(3)) for j in range(4)]
        other = teacher[i].tolist()
        assert mse[i].item() == pytest.approx(sum((a - b) ** 2 for a, b in zip(moved, other, strict=True)) / 4)
        dot = sum(a * b for a, b in zip(moved, other, strict=True))
        assert cosine[i].item() == pytest.approx(1 - dot / math.hypot(*moved) / math.hypot(*other), abs=1e-5)
    for loss in (hidden_mse, hidden_cosine):
        torch.testing.assert_close(loss(teacher, teacher), torch.zeros(2), atol=1e-6, rtol=0)
        with pytest.raises(ValueError, match="have width 3, the teacher's 4: a `projection` is needed"):
            loss(student, teacher)


def test_attention_follows_its_definition_and_leaves_out_what_is_not_seen():
    unseen = ~torch.ones(3, 3, dtype=torch.bool).tril()
    student = random(2, 2, 3, 3).masked_fill(unseen, -math.inf)
    teacher = random(2, 4, 3, 3, seed=1).masked_fill(unseen, torch.finfo(torch.float32).min)
    found = attention_mse(student, teacher, MASK)
    for b in range(2):
        for t in range(3):
            seen = [s for s in range(t + 1) if MASK[b, s] and MASK[b, t]]
            total = sum(
                (student[b, a, t, s].item() - (teacher[b, 2 * a, t, s] + teacher[b, 2 * a + 1, t, s]).item() / 2) ** 2
                for a in range(2)
                for s in seen
            )
            assert found[b, t].item() == pytest.approx(total / 2 / max(len(seen), 1), rel=1e-4)
    with pytest.raises(ValueError, match="3 attention heads cannot be averaged to 2"):
        attention_mse(student, random(2, 3, 3, 3), MASK)


@pytest.mark.parametrize("causal", [True, False])
def test_relations_follow_their_definition(causal):
    student, teacher = random(2, 3, 4), random(2, 3, 6, seed=1)
    found = attention_relation(student, teacher, MASK, heads=2, causal=causal)

    def relation(states, b, a, t):
        width = states.shape[-1] // 2
        part = states[b, :, a * width : (a + 1) * width]
        seen = [s for s in range(3) if MASK[b, s] and (s <= t or not causal)]
        scores = [math.exp(sum(x * y for x, y in zip(part[t].tolist(), part[s].tolist(), strict=True)) / width**0.5)
                  for s in seen]  # fmt: skip
        return [score / sum(scores) for score in scores]

    for b in range(2):
        for t in range(3):
            want = 0.0
            if MASK[b, t]:
                for a in range(2):
                    q, p = relation(student, b, a, t), relation(teacher, b, a, t)
                    want += sum(y * math.log(y / x) for x, y in zip(q, p, strict=True)) / 2
            assert found[b, t].item() == pytest.approx(want, rel=1e-3, abs=1e-6)
    turned = student @ torch.linalg.qr(random(4, 4, seed=3)).Q  # relations do not see a rotation of all dimensions
    one, two = (attention_relation(side, teacher, MASK) for side in (student, turned))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="`heads` has to divide both widths, got 4 relation heads and width 6"):
        attention_relation(student, teacher, MASK, heads=4)


def test_gradients_reach_the_student_and_the_projection_alone():
    student, teacher = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_()
    projection = random(4, 4, seed=2).requires_grad_()
    flat = student.flatten(0, 1), teacher.flatten(0, 1), projection
    total = attention_relation(student, teacher, MASK, heads=2).sum() + hidden_mse(*flat).sum()
    total = total + hidden_cosine(*flat).sum()
    total.backward()
    assert student.grad.isfinite().all() and projection.grad.abs().sum() > 0 and teacher.grad is None
    assert list(HIDDEN_LOSSES) == ["hidden_mse", "hidden_cosine", "attention_mse", "attention_relation"]
