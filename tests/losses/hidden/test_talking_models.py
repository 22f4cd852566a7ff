"""Against the description in plain sums; models that understand each other."""

import pytest
import torch
from losses.hidden_problem import random

from hf_transfer_ext.losses.hidden import talking_models
from hf_transfer_ext.losses.hidden.talking_models import Speaker


def linear(matrix):
    return lambda x: x @ matrix.T


def mean_square(x):
    return sum(value**2 for value in x.tolist()) / len(x)


def test_a_conversation_follows_its_description():
    size = {"student": (4, 5), "teacher": (6, 7)}  # width at the cut, and of the message, by seed below
    parts = {}
    for i, (role, (width, _)) in enumerate(size.items()):
        parts[role] = [
            random(3, width, seed=10 * i),
            random(width, 3, seed=10 * i + 1),
            random(width, width, seed=10 * i + 2),
        ]
    h, t = random(1, 2, 4, seed=5), random(1, 2, 6, seed=6)
    student, teacher = (
        Speaker(states, *(linear(matrix) for matrix in parts[role]))
        for role, states in (("student", h), ("teacher", t))
    )
    found = talking_models(
        student,
        teacher,
        lambda x: x[0].square().sum(-1),
        lambda x: x[0],
        rounds=2,
        message_weight=0.5,
        state_weight=0.25,
    )
    (e_s, d_s, u_s), (e_t, d_t, u_t) = parts["student"], parts["teacher"]
    for i in range(2):
        own, other, want = h[0, i], t[0, i], 0.0
        for _ in range(2):
            message = e_s @ own
            want += 0.5 * mean_square(message - e_t @ other)
            want += 0.25 * mean_square(d_s @ message - own) / mean_square(own)
            want += 0.25 * mean_square(d_t @ e_t @ other - other) / mean_square(other)
            own = d_s @ e_t @ u_t @ d_t @ message
            want += sum(value**2 for value in (u_s @ own).tolist())
        assert found[i].item() == pytest.approx(want / 2, rel=1e-4)


def test_models_that_understand_each_other_have_the_task_alone():
    states, same = random(1, 3, 4), Speaker
    turn = torch.linalg.qr(random(4, 4, seed=2)).Q
    one = same(states, linear(turn), linear(turn.T), lambda x: x)
    found = talking_models(one, one, lambda x: x[0].sum(-1), lambda x: x[0], message_size=4)
    torch.testing.assert_close(found, states[0].sum(-1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="needs `rounds` and `message_size` >= 1 and weights >= 0, got 0, 64"):
        talking_models(one, one, lambda x: x[0].sum(-1), lambda x: x[0], rounds=0)
