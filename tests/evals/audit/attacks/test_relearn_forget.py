import copy

import pytest
import torch
from evals.audit.planted_people import DATA, FORGET, never_taught, planted, subject

from hf_transfer_ext.evals.audit.attacks.plain_question import plain_question
from hf_transfer_ext.evals.audit.attacks.relearn_forget import relearn_forget


def test_a_model_that_only_refuses_has_it_back_sooner_than_one_that_never_knew():
    shallow, clean = subject(planted()[1]), subject(never_taught())
    options = {"epochs": 3.0, "learning_rate": 2e-3}
    gained = [relearn_forget(one, DATA, **options) - plain_question(one, DATA) for one in (shallow, clean)]
    assert relearn_forget(shallow, DATA, **options).mean() > relearn_forget(clean, DATA, **options).mean() + 0.2
    assert gained[0].mean() > 0


def test_weights_and_trainability_are_as_before_also_after_an_error():
    model = copy.deepcopy(planted()[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    relearn_forget(subject(model), DATA, learning_rate=1e-2)
    with pytest.raises(ValueError, match="Example 0"):
        relearn_forget(subject(model), type(DATA)([{"question": "no answer"}, *FORGET]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_without_a_step_nothing_is_learned():
    shallow = subject(planted()[1])
    untouched = relearn_forget(shallow, DATA, learning_rate=0.0)
    assert untouched == pytest.approx(plain_question(shallow, DATA), abs=1e-6)
