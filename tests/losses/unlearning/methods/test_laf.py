import pytest
import torch
from losses.test_autoencoder import errors, states
from losses.unlearning.methods.answers import Answers, hidden_pass

from hf_transfer_ext.losses.unlearning.methods import METHODS


def test_each_set_gets_an_autoencoder_that_knows_it_and_not_the_other():
    parts = {"forget": states(), "retain": states(seed=1)}

    def passes(x):
        return [lambda part=part: hidden_pass(part, [0] * len(part)) for part in x.split(150)]

    weights = METHODS["laf"](steps=400).prepare(Answers({name: passes(x) for name, x in parts.items()}))
    for own, other in (("forget", "retain"), ("retain", "forget")):
        assert errors(parts[own], weights, own).mean() < 0.2
        assert errors(parts[own], weights, other).mean() > 0.6


def test_hidden_states_move_away_while_those_to_retain_stay():
    """The two losses on free states, by gradient descent: a forgotten one leaves its density, a kept one does not."""
    forget, retain = states(40), states(40, seed=1)
    one = {"forget": [lambda: hidden_pass(forget, [0] * 40)], "retain": [lambda: hidden_pass(retain, [0] * 40)]}
    weights = METHODS["laf"]().prepare(Answers(one))
    from hf_transfer_ext.losses.autoencoder import rebuilt_by
    from hf_transfer_ext.losses.unlearning import laf, retain_laf

    moving, held = forget.clone().requires_grad_(True), retain.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([moving, held], lr=1.0)
    for _ in range(30):
        loss = laf(moving, rebuilt_by(moving, weights, "forget"), forget, torch.full((8,), 5.0)).sum()
        loss = loss + retain_laf(held, rebuilt_by(held, weights, "retain"), retain).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cosines = torch.nn.functional.cosine_similarity
    turned = 1 - cosines(moving, forget).mean().item()
    assert turned > 3 * (1 - cosines(held, retain).mean().item()) and turned > 0.02
    assert errors(moving, weights, "forget").mean() > errors(forget, weights, "forget").mean()


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`steps` must be >= 1"):
        METHODS["laf"](steps=0)
    with pytest.raises(ValueError, match="`rate` must be > 0"):
        METHODS["laf"](rate=0.0)
