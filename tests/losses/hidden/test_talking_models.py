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


@pytest.mark.parametrize("gate", [None, 0.0, 0.3])
def test_a_conversation_follows_its_description(gate):
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
        Speaker(states, *(linear(matrix) for matrix in parts[role]), None if gate is None else torch.tensor(gate))
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
        gated=gate is not None,
    )
    (e_s, d_s, u_s), (e_t, d_t, u_t) = parts["student"], parts["teacher"]
    for i in range(2):
        own, other, want = h[0, i], t[0, i], 0.0
        for _ in range(2):
            message = e_s @ own
            want += 0.5 * mean_square(message - e_t @ other)
            want += 0.25 * mean_square(d_s @ message - own) / mean_square(own)
            want += 0.25 * mean_square(d_t @ e_t @ other - other) / mean_square(other)
            share = 1.0 if gate is None else gate
            own = (1 - share) * own + share * (d_s @ e_t @ u_t @ d_t @ message)
            want += sum(value**2 for value in (u_s @ own).tolist())
        assert found[i].item() == pytest.approx(want / 2, rel=1e-4)


def test_a_closed_gate_leaves_the_student_its_own_task_and_copies_train_no_states():
    h, t = random(1, 2, 4).requires_grad_(), random(1, 2, 4, seed=1)
    encode, decode = random(3, 4, seed=2).requires_grad_(), random(4, 3, seed=3).requires_grad_()
    gate = torch.tensor(0.0, requires_grad=True)

    def gradients(**weights):
        one, other = (Speaker(x, linear(encode), linear(decode), linear(random(4, 4, seed=4)), gate) for x in (h, t))
        found = talking_models(one, other, lambda x: x[0].square().sum(-1), lambda x: x[0], **weights).sum()
        return found, torch.autograd.grad(found, [h, encode, decode, gate])

    value, (of_states, of_encoder, of_decoder, of_gate) = gradients(message_weight=0.0, state_weight=0.0)
    own = linear(random(4, 4, seed=4))(h).square().sum()
    torch.testing.assert_close(value, own)
    torch.testing.assert_close(of_states, torch.autograd.grad(own, h)[0])
    assert not of_encoder.any() and not of_decoder.any() and of_gate != 0  # the gate opens if the answer helps
    _, (with_copies, of_encoder, of_decoder, _) = gradients(message_weight=0.0)
    torch.testing.assert_close(with_copies, of_states)
    assert of_encoder.any() and of_decoder.any()


def test_models_that_understand_each_other_have_the_task_alone():
    states, same = random(1, 3, 4), Speaker
    turn = torch.linalg.qr(random(4, 4, seed=2)).Q
    one = same(states, linear(turn), linear(turn.T), lambda x: x)
    found = talking_models(one, one, lambda x: x[0].sum(-1), lambda x: x[0], message_size=4, gated=False)
    torch.testing.assert_close(found, states[0].sum(-1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="needs `rounds` and `message_size` >= 1 and weights >= 0, got 0, 64"):
        talking_models(one, one, lambda x: x[0].sum(-1), lambda x: x[0], rounds=0)
    with pytest.raises(ValueError, match="needs a `gate` of the student where `gated` is on"):
        talking_models(one, one, lambda x: x[0].sum(-1), lambda x: x[0])
